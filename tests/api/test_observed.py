"""What is told of a request at the front end: its span and its line, from the arrival to the last frame."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from paceline.api.observed import Observer
from paceline.api.prompts import ChatMessage
from paceline.errors import Overloaded, PacelineError, RequestTimeout, Unavailable
from paceline.telemetry.logs import JsonFormatter
from paceline.telemetry.requests import Origin
from paceline.telemetry.tracing import NoTracer
from paceline.types import Accepted, Delta, Failure, FinishReason, Frame, SamplingParams
from tests.api.scripted import ACCEPTED, CHAT, COMPLETION, METRICS, MODEL, Hang, ScriptedTargets, gateway, http
from tests.telemetry.recorded import CLIENT, CLIENT_SPAN, CLIENT_TRACE, Recorded, about, parent_of, span_id, trace_of

CHAT_SPAN = f"chat {MODEL}"
HEADERS = {"traceparent": CLIENT, "x-request-id": "mine-7", "x-session-id": "s/9"}
SECRET = "the-words-of-a-user"


async def told(
    script: Sequence[Frame | Exception | Hang], *, timeout_s: float = 30.0, n: int = 1
) -> tuple[Recorded, BaseException | None]:
    """One chat to its end."""
    recorded = Recorded()
    front = gateway(ScriptedTargets(script), timeout_s=timeout_s, observer=Observer(recorded.tracer, MODEL))
    params = SamplingParams(n=n, seed=1)
    try:
        async with await front.open(await front.prepare_chat([ChatMessage("user", "hi")], params)) as stream:
            async for _ in stream:
                pass
    except PacelineError as error:
        return recorded, error
    return recorded, None


async def posted(path: str, body: dict[str, Any]) -> tuple[Recorded, ScriptedTargets]:
    recorded, targets = Recorded(), ScriptedTargets()
    async with http(targets, observer=Observer(recorded.tracer, MODEL)) as client:
        (await client.post(path, json=body, headers=HEADERS)).raise_for_status()
    return recorded, targets


async def test_a_client_s_trace_goes_on_in_the_request_s_span() -> None:
    recorded, _ = await posted("/v1/chat/completions", CHAT)
    span = recorded.spans[CHAT_SPAN]
    assert (trace_of(span), parent_of(span)) == (CLIENT_TRACE, CLIENT_SPAN)


async def test_a_replica_is_told_of_the_request_s_span() -> None:
    recorded, targets = await posted("/v1/chat/completions", CHAT)
    (request,) = targets.requests
    assert request.trace == f"00-{CLIENT_TRACE:032x}-{span_id(recorded.spans[CHAT_SPAN]):016x}-01"


async def test_a_span_names_model_session_request_and_replica() -> None:
    recorded, targets = await posted("/v1/chat/completions", CHAT)
    found = about(recorded.spans[CHAT_SPAN])
    assert {name: found[name] for name in found if name in NAMES} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.id": targets.requests[0].request_id,
        "gen_ai.conversation.id": "s/9",
        "paceline.request_id": "mine-7",
        "paceline.replica": "target-1",
    }


NAMES = {
    "gen_ai.operation.name",
    "gen_ai.request.model",
    "gen_ai.response.id",
    "gen_ai.conversation.id",
    "paceline.request_id",
    "paceline.replica",
}


async def test_a_span_counts_tokens_and_candidates() -> None:
    recorded, _ = await posted("/v1/chat/completions", CHAT)
    found = about(recorded.spans[CHAT_SPAN])
    assert (found["gen_ai.usage.output_tokens"], found["gen_ai.response.finish_reasons"]) == (3, ("stop",))
    assert (found["paceline.drafted_tokens"], found["paceline.accepted_tokens"]) == (2, 1)


async def test_a_completion_is_called_one() -> None:
    recorded, _ = await posted("/v1/completions", COMPLETION)
    assert list(recorded.spans) == [f"text_completion {MODEL}"]


async def test_a_span_has_no_word_of_a_text() -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": SECRET}]}
    recorded, _ = await posted("/v1/chat/completions", body)
    assert SECRET not in recorded.spans[CHAT_SPAN].to_json()


async def test_a_span_begins_when_the_request_came() -> None:
    recorded = Recorded()
    front = gateway(ScriptedTargets(), observer=Observer(recorded.tracer, MODEL))
    prepared = await front.prepare_completion("hi", SamplingParams())
    watched = front._observer.begin(prepared.request, Origin(arrived=12_345), 30.0)  # type: ignore[union-attr]
    watched.span.end()
    assert recorded.spans[f"text_completion {MODEL}"].start_time == 12_345


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ((Failure.of(Overloaded("full", retry_after=1.0)),), "rate_limit_exceeded"),
        ((ACCEPTED, Failure.of(Unavailable("lost"))), "service_unavailable"),
        ((ACCEPTED, Delta((10,), "a")), "service_unavailable"),
    ],
    ids=["refused", "lost", "cut short"],
)
async def test_an_error_is_the_span_s_status(script: tuple[Frame, ...], code: str) -> None:
    recorded, error = await told(script)
    span = recorded.spans[CHAT_SPAN]
    assert isinstance(error, PacelineError)
    assert (span.status.description, about(span)["error.type"], error.code) == (code, code, code)


async def test_a_request_out_of_time_is_told_from_one_given_up() -> None:
    recorded, error = await told((ACCEPTED, Hang()), timeout_s=0.05)
    assert isinstance(error, RequestTimeout)
    assert about(recorded.spans[CHAT_SPAN])["error.type"] == "timeout"


async def test_a_request_given_up_is_no_fault_of_the_server_s() -> None:
    recorded = Recorded()
    front = gateway(ScriptedTargets((ACCEPTED, Delta((10,), "a"), Hang())), observer=Observer(recorded.tracer, MODEL))
    async with await front.open(await front.prepare_chat([ChatMessage("user", "hi")], SamplingParams())) as stream:
        await anext(stream)
    span = recorded.spans[CHAT_SPAN]
    assert (span.status.is_ok, about(span)["error.type"]) == (True, "cancelled")


async def test_outputs_are_told_together() -> None:
    ends = [Delta((10, 11, 12), "x", FinishReason.STOP, METRICS, index=index) for index in (1, 0)]
    recorded, _ = await told((Accepted("target-1", 7, 4), *ends), n=2)
    found = about(recorded.spans[CHAT_SPAN])
    assert (found["gen_ai.usage.output_tokens"], found["gen_ai.response.finish_reasons"]) == (6, ("stop", "stop"))


async def test_a_traceparent_that_is_none_begins_a_trace() -> None:
    recorded = Recorded()
    async with http(ScriptedTargets(), observer=Observer(recorded.tracer, MODEL)) as client:
        await client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": "00-me"})
    assert parent_of(recorded.spans[CHAT_SPAN]) is None


async def test_a_server_in_front_with_a_span_of_its_own_stands_between() -> None:
    recorded = Recorded()
    in_front = recorded.tracer.start("proxy", parent=CLIENT)
    observer = Observer(recorded.tracer, MODEL, within=lambda: in_front.traceparent)
    async with http(ScriptedTargets(), observer=observer) as client:
        await client.post("/v1/chat/completions", json=CHAT, headers=HEADERS)
    in_front.end()
    assert parent_of(recorded.spans[CHAT_SPAN]) == span_id(recorded.spans["proxy"])


async def line(caplog: pytest.LogCaptureFixture, script: Sequence[Frame] = (), **options: Any) -> dict[str, Any]:
    """What the log says of one chat, as JSON."""
    targets = ScriptedTargets(script) if script else ScriptedTargets()
    observer = Observer(NoTracer(), MODEL, log_requests=True)
    body = {**CHAT, "messages": [{"role": "user", "content": SECRET}]}
    with caplog.at_level(logging.INFO, logger="paceline.api.observed"):
        async with http(targets, observer=observer, **options) as client:
            await client.post("/v1/chat/completions", json=body, headers=HEADERS)
    (record,) = [each for each in caplog.records if each.name == "paceline.api.observed"]
    found: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return found


async def test_a_line_of_the_log_tells_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    found = await line(caplog)
    told = ("session_id", "status", "finish_reason", "target", "prompt_tokens", "completion_tokens", "accepted_tokens")
    prompt = found["prompt_tokens"]
    assert [found[name] for name in told] == ["s/9", "ok", "stop", "target-1", prompt, 3, 1]


async def test_a_line_has_the_ids_of_answer_and_trace(caplog: pytest.LogCaptureFixture) -> None:
    found = await line(caplog)
    assert found["completion_id"].startswith("chatcmpl-")
    assert found["trace_id"] == f"{CLIENT_TRACE:032x}"


async def test_a_line_has_no_word_of_a_text(caplog: pytest.LogCaptureFixture) -> None:
    found = await line(caplog)
    assert SECRET not in json.dumps(found) and "Hel" not in json.dumps(found)


async def test_a_line_says_what_went_wrong(caplog: pytest.LogCaptureFixture) -> None:
    found = await line(caplog, (Failure.of(Unavailable("lost")),))
    assert (found["status"], found["completion_tokens"]) == ("service_unavailable", 0)


async def test_a_line_of_text_says_the_same(caplog: pytest.LogCaptureFixture) -> None:
    found = await line(caplog)
    assert "session_id=s/9" in found["message"] and "completion_tokens=3" in found["message"]


async def test_requests_are_not_logged_unless_it_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="paceline.api.observed"):
        async with http(ScriptedTargets(), observer=Observer(Recorded().tracer, MODEL)) as client:
            await client.post("/v1/chat/completions", json=CHAT)
    assert [each for each in caplog.records if each.name == "paceline.api.observed"] == []
