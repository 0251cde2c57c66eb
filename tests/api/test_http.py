"""Bodies, headers and statuses of the HTTP API."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from paceline.api import create_app
from paceline.config import LimitSettings
from paceline.errors import EngineError, Overloaded, PacelineError, RequestTimeout, Unavailable
from paceline.types import Delta, Failure, FinishReason, Verified
from tests.api.scripted import (
    ACCEPTED,
    CHAT,
    COMPLETION,
    HELLO,
    METRICS,
    MODEL,
    Hang,
    ScriptedTargets,
    events,
    gateway,
    http,
)

BOTH = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)], ids=["chat", "completions"]
)
INFO = {
    "replica_id": "target-1",
    "seed": 7,
    "drafted_tokens": 2,
    "accepted_tokens": 1,
    "late_drafts": 1,
    "wasted_drafts": 1,
    "sources": {"remote": {"drafted": [1, 1], "accepted": [1, 0], "wasted": 1}},
    "steps": 2,
    "cached_tokens": 2,
    "ttft_s": 0.25,
    "total_s": 0.5,
}
USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 3,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 1},
}


async def post(
    path: str, body: dict[str, Any], targets: ScriptedTargets | None = None, **headers: str
) -> httpx.Response:
    async with http(targets) as client:
        return await client.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def test_a_chat_completion_is_openais_object_and_says_how_it_was_made() -> None:
    response = await post("/v1/chat/completions", {**CHAT, "session_id": "s"})
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": USAGE,
        "paceline": {**INFO, "session_id": "s"},
    }


async def test_a_text_completion_is_openais_object_and_says_how_it_was_made() -> None:
    response = await post("/v1/completions", COMPLETION)
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": "Hello", "finish_reason": "stop"}],
        "usage": USAGE,
        "paceline": INFO,
    }


async def test_a_chat_is_bounded_by_the_context_and_a_completion_by_sixteen_tokens() -> None:
    targets = ScriptedTargets()
    await post("/v1/chat/completions", CHAT, targets)
    await post("/v1/completions", COMPLETION, targets)
    assert [request.params.max_tokens for request in targets.requests] == [512 - 4, 16]


@BOTH
async def test_speculation_can_be_turned_off(path: str, body: dict[str, Any]) -> None:
    targets = ScriptedTargets()
    await post(path, body, targets)
    await post(path, {**body, "speculation": False}, targets)
    assert [request.speculate for request in targets.requests] == [True, False]


@BOTH
async def test_a_priority_reaches_the_replica_where_the_policy_is_priority(path: str, body: dict[str, Any]) -> None:
    targets = ScriptedTargets()
    async with http(targets, scheduling_policy="priority") as client:
        for given in ({"priority": -3}, {"priority": None}, {}):
            await client.post(path, json={**body, **given})
    assert [request.priority for request in targets.requests] == [-3, 0, 0]


@BOTH
async def test_token_ids_come_only_if_asked_for(path: str, body: dict[str, Any]) -> None:
    response = await post(path, {**body, "return_token_ids": True})
    assert response.json()["paceline"]["token_ids"] == [10, 11, 12]


@BOTH
async def test_usage_is_counted_here_if_the_replica_reports_none(path: str, body: dict[str, Any]) -> None:
    targets = ScriptedTargets([ACCEPTED, Delta((10, 11), "x", FinishReason.LENGTH)])
    usage = (await post(path, body, targets)).json()["usage"]
    assert usage["prompt_tokens"] == len(targets.requests[0].token_ids)
    assert usage["completion_tokens"] == 2


async def test_the_answer_says_why_it_was_made_where_it_was_made() -> None:
    routed = ScriptedTargets([replace(ACCEPTED, route="holder"), *HELLO[1:]])
    async with http(routed) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT)
        status = (await client.get("/status")).json()
        metrics = (await client.get("/metrics")).text
    assert answer.headers["x-paceline-route"] == "holder"
    assert status["router"] == {"routes": {"holder": 1}, "resumptions": 0}
    assert 'paceline_routed_requests_total{model_name="tiny",router="",reason="holder"} 1.0' in metrics


async def test_where_nobody_chose_there_is_no_reason() -> None:
    assert "x-paceline-route" not in (await post("/v1/chat/completions", CHAT)).headers


@BOTH
async def test_the_session_may_be_named_in_the_header(path: str, body: dict[str, Any]) -> None:
    response = await post(path, body, x_session_id="mine")
    assert response.headers["x-session-id"] == "mine"
    assert response.json()["paceline"]["session_id"] == "mine"


async def test_header_and_body_may_name_the_same_session() -> None:
    response = await post("/v1/chat/completions", {**CHAT, "session_id": "mine"}, x_session_id="mine")
    assert response.status_code == 200


async def test_header_and_body_may_not_name_two_sessions() -> None:
    response = await post("/v1/chat/completions", {**CHAT, "session_id": "yours"}, x_session_id="mine")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "session_id")


async def test_a_session_id_beyond_latin_1_survives_both_headers() -> None:
    async with http() as client:
        named = {"x-session-id": "会话".encode()}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=named)  # type: ignore[arg-type]
    assert response.json()["paceline"]["session_id"] == "会话"
    assert response.headers.raw.count((b"x-session-id", "会话".encode())) == 1


async def test_a_session_header_that_is_no_utf_8_is_refused() -> None:
    async with http() as client:
        named = {"x-session-id": b"\xff\xfe"}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=named)  # type: ignore[arg-type]
    assert (response.status_code, response.json()["error"]["param"]) == (400, "session_id")


async def test_the_response_names_its_replica() -> None:
    assert (await post("/v1/chat/completions", CHAT)).headers["x-paceline-replica"] == "target-1"


async def test_the_clients_request_id_is_echoed() -> None:
    assert (await post("/v1/chat/completions", CHAT, x_request_id="abc-1")).headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129])
async def test_a_request_id_that_is_none_is_replaced(given: str) -> None:
    response = await post("/v1/chat/completions", CHAT, x_request_id=given)
    assert response.headers["x-request-id"].startswith("req-")


async def test_errors_have_a_request_id_too() -> None:
    assert (await post("/nowhere", {}, x_request_id="abc-1")).headers["x-request-id"] == "abc-1"


async def test_request_ids_can_be_left_to_the_server_in_front() -> None:
    app = create_app(gateway(), request_ids=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
        assert "x-request-id" not in (await client.get("/health")).headers


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after=1.2), 429, "rate_limit_error"),
        (Unavailable("no replica"), 503, "server_error"),
        (RequestTimeout("too slow"), 504, "timeout_error"),
        (EngineError("a step failed"), 500, "server_error"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_before_the_first_token_has_its_status(
    path: str, body: dict[str, Any], stream: bool, error: PacelineError, status: int, kind: str
) -> None:
    response = await post(path, {**body, "stream": stream}, ScriptedTargets([Failure.of(error)]))
    assert response.status_code == status
    assert response.json() == {
        "error": {"message": error.message, "type": kind, "param": None, "code": error.code},
    }


async def test_an_overload_says_when_to_try_again_in_whole_seconds() -> None:
    targets = ScriptedTargets([Failure.of(Overloaded("full", retry_after=1.2))])
    assert (await post("/v1/chat/completions", CHAT, targets)).headers["retry-after"] == "2"


@BOTH
async def test_a_failure_in_the_middle_of_a_whole_answer_has_its_status(path: str, body: dict[str, Any]) -> None:
    targets = ScriptedTargets([*HELLO[:2], Failure("service_unavailable", "replica died")])
    response = await post(path, body, targets)
    assert (response.status_code, response.json()["error"]["message"]) == (503, "replica died")
    assert targets.ended == ["closed"]


@BOTH
async def test_the_deadline_of_a_whole_answer_has_its_status(path: str, body: dict[str, Any]) -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with http(targets, timeout_s=0.01) as client:
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert targets.ended == ["cancelled"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_error_says_nothing_and_is_logged(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    targets = ScriptedTargets([RuntimeError("secret path /etc/x")])
    with caplog.at_level(logging.ERROR):
        response = await post("/v1/chat/completions", {**CHAT, "stream": stream}, targets)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "secret path /etc/x" in caplog.text
    assert "x-request-id" in response.headers


async def test_an_unknown_model_is_not_found() -> None:
    response = await post("/v1/chat/completions", {**CHAT, "model": "other"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", "application/json", "body: not valid JSON at character 1"),
        (b"", "application/json", "body: required"),
        (b"[1]", "application/json", "body: must be a JSON object"),
        (b'{"a": 1}', "text/plain", "body: must be a JSON object, sent with content-type application/json"),
        (b"\xff", "application/json", "body: not UTF-8 at byte 0"),
        (b"[" * 100_000, "application/json", "body: more than 64 objects and lists in each other"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(content: bytes, kind: str, message: str) -> None:
    async with http() as client:
        response = await client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    "content",
    [
        b'{"\\ud800": 1}',
        b'{"messages": [{"role": "\\ud800", "content": "hi"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "session_id": "\\ud800"}',
    ],
)
async def test_half_a_surrogate_pair_is_refused_readably(content: bytes) -> None:
    async with http() as client:
        response = await client.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_a_body_over_the_limit_is_refused(chunked: bool) -> None:
    async def chunks() -> Any:
        for _ in range(4):
            yield b" " * 300

    app = create_app(gateway(), limits=LimitSettings(max_body_bytes=1000))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
        response = await client.post(
            "/v1/chat/completions",
            content=chunks() if chunked else b" " * 1200,
            headers={"content-type": "application/json"},
        )
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (413, "request_too_large")
    assert error["message"] == "the request body is larger than 1000 bytes"


async def test_a_body_at_the_limit_is_accepted() -> None:
    body = json.dumps(CHAT).encode()
    app = create_app(gateway(), limits=LimitSettings(max_body_bytes=len(body)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
        response = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200


async def test_an_unknown_route_is_not_found() -> None:
    response = await post("/v1/images", {})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "no such route: POST '/v1/images'"


async def test_a_wrong_method_names_the_right_one() -> None:
    async with http() as client:
        response = await client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/health", 200, {"status": "ok", "model": MODEL}),
        (
            "/status",
            200,
            {
                "model": MODEL,
                "max_model_len": 512,
                "targets": [{"replica_id": "target-1", "running": 1}],
                "drafts": [{"replica_id": "draft-1", "load": 0.5}],
                "router": {"routes": {}, "resumptions": 0},
                "autoscaling": {},
            },
        ),
        (
            "/v1/sessions/s/1",
            200,
            {
                "object": "session",
                "session_id": "s/1",
                "replica_id": "target-1",
                "cached_tokens": 40,
                "running": True,
            },
        ),
    ],
)
async def test_what_a_get_answers(path: str, status: int, body: dict[str, Any]) -> None:
    async with http() as client:
        response = await client.get(path)
    assert (response.status_code, response.json()) == (status, body)


async def test_the_model_is_listed_and_described() -> None:
    async with http() as client:
        listed = (await client.get("/v1/models")).json()
        described = (await client.get(f"/v1/models/{MODEL}")).json()
        unknown = await client.get("/v1/models/org/other")
    assert listed == {"object": "list", "data": [described]}
    assert (described["id"], described["object"], described["max_model_len"]) == (MODEL, "model", 512)
    assert unknown.status_code == 404


async def test_a_closed_session_is_gone() -> None:
    async with http() as client:
        deleted = await client.delete("/v1/sessions/s/1")
        again = await client.delete("/v1/sessions/s/1")
        left = await client.get("/v1/sessions")
        gone = await client.get("/v1/sessions/s/1")
    assert deleted.json() == {"object": "session.deleted", "session_id": "s/1", "deleted": True}
    assert [session["session_id"] for session in left.json()["data"]] == ["s2"]
    assert (again.status_code, gone.status_code) == (404, 404)
    assert gone.json()["error"]["code"] == "session_not_found"


async def test_a_gateway_may_be_looked_up_when_a_request_arrives() -> None:
    looked_up = gateway()
    app = create_app(lambda: looked_up)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
        assert (await client.get("/health")).json()["model"] == MODEL


async def test_the_openapi_description_has_every_route() -> None:
    async with http() as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    assert sorted(paths) == [
        "/detokenize",
        "/health",
        "/metrics",
        "/ping",
        "/status",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/nodes",
        "/v1/nodes/{node}/drain",
        "/v1/replicas/{replica_id}/relieve",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/sessions",
        "/v1/sessions/{session_id}",
        "/v1/sessions/{session_id}/fork",
        "/v1/sessions/{session_id}/messages",
        "/v1/sessions/{session_id}/move",
        "/v1/sessions/{session_id}/turns",
        "/version",
    ]


# Streams


async def stream_of(
    path: str, body: dict[str, Any], targets: ScriptedTargets | None = None, **options: Any
) -> list[Any]:
    response = await post(path, {**body, "stream": True, **options}, targets)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)


def choices(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"] for chunk in chunks[:-1]]


async def test_a_streamed_chat_gives_the_role_then_one_chunk_a_delta() -> None:
    chunks = await stream_of("/v1/chat/completions", CHAT)
    assert choices(chunks) == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}}],
        [{"index": 0, "delta": {"content": "Hel"}}],
        [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}],
    ]
    assert chunks[-1] == "[DONE]"
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


async def test_a_streamed_completion_gives_one_chunk_a_delta() -> None:
    chunks = await stream_of("/v1/completions", COMPLETION)
    assert choices(chunks) == [
        [{"index": 0, "text": "Hel"}],
        [{"index": 0, "text": "lo", "finish_reason": "stop"}],
    ]
    assert chunks[-1] == "[DONE]"


@BOTH
async def test_without_usage_the_last_delta_says_how_it_was_made(path: str, body: dict[str, Any]) -> None:
    chunks = await stream_of(path, {**body, "session_id": "s"})
    assert [chunk.get("paceline") for chunk in chunks[-3:-1]] == [None, {**INFO, "session_id": "s"}]
    assert not any("usage" in chunk for chunk in chunks[:-1])


@BOTH
async def test_with_usage_a_chunk_without_choices_closes_the_stream(path: str, body: dict[str, Any]) -> None:
    chunks = await stream_of(path, {**body, "session_id": "s"}, stream_options={"include_usage": True})
    assert [chunk.get("usage") for chunk in chunks[-3:-1]] == [None, USAGE]
    assert [chunk.get("paceline") for chunk in chunks[-3:-1]] == [None, {**INFO, "session_id": "s"}]
    assert chunks[-2]["choices"] == []


@BOTH
async def test_chunks_have_their_token_ids_and_the_closing_one_all(path: str, body: dict[str, Any]) -> None:
    chunks = await stream_of(path, body, stream_options={"include_usage": True}, return_token_ids=True)
    told = [chunk["paceline"]["token_ids"] for chunk in chunks[:-1] if "paceline" in chunk]
    assert told == [[10, 11], [12], [10, 11, 12]]


async def test_a_chunk_tells_which_of_its_text_was_guessed() -> None:
    script = [ACCEPTED, Delta((10, 11, 12), "Hello", FinishReason.STOP, METRICS, verified=Verified("remote", 3, 2, 4))]
    for usage in ({}, {"stream_options": {"include_usage": True}}):
        chunks = await stream_of("/v1/chat/completions", CHAT, ScriptedTargets(script), return_token_ids=True, **usage)
        guessed = [chunk["paceline"]["verified"] for chunk in chunks[:-1] if "verified" in chunk.get("paceline", {})]
        assert guessed == [{"source": "remote", "drafted": 3, "accepted": 2, "text": "Hell"}]


@BOTH
@pytest.mark.parametrize(
    ("step", "message", "code"),
    [
        (Failure("service_unavailable", "replica died"), "replica died", "service_unavailable"),
        (RuntimeError("secret"), "internal error", "internal_error"),
    ],
    ids=["failure", "unexpected"],
)
async def test_an_error_after_the_first_token_is_the_last_event(
    path: str, body: dict[str, Any], step: Failure | Exception, message: str, code: str
) -> None:
    chunks = await stream_of(path, body, ScriptedTargets([*HELLO[:2], step]))
    assert chunks[-1] == {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


async def test_the_deadline_of_a_stream_is_an_event() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with http(targets, timeout_s=0.01) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert events(response.text)[-1]["error"]["code"] == "timeout"
    assert targets.ended == ["cancelled"]


# Synthetic acceptance: the text is nonsense, and every answer says so.


async def marked(path: str, body: dict[str, Any], probability: float | None) -> httpx.Response:
    app = create_app(gateway(synthetic_acceptance=probability))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline") as client:
        return await client.post(path, json=body)


@BOTH
async def test_a_synthetic_answer_is_marked_thrice(path: str, body: dict[str, Any]) -> None:
    response = await marked(path, body, 0.7)
    answer = response.json()
    assert answer["paceline"]["synthetic_acceptance"] == 0.7
    assert answer["system_fingerprint"] == "tiny-synthetic-acceptance-0.7"
    assert response.headers["x-paceline-synthetic-acceptance"] == "0.7"


@BOTH
async def test_every_chunk_of_a_synthetic_answer_is_marked(path: str, body: dict[str, Any]) -> None:
    response = await marked(path, {**body, "stream": True}, 0.0)
    *chunks, _ = events(response.text)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"tiny-synthetic-acceptance-0"}
    assert chunks[-1]["paceline"]["synthetic_acceptance"] == 0.0
    assert response.headers["x-paceline-synthetic-acceptance"] == "0"


@BOTH
async def test_a_true_answer_bears_no_mark(path: str, body: dict[str, Any]) -> None:
    response = await marked(path, body, None)
    assert "x-paceline-synthetic-acceptance" not in response.headers
    assert "synthetic" not in response.text
