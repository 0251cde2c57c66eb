"""The session calls of the HTTP API."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from paceline.api import SessionInfo
from tests.api.scripted import ScriptedTargets, events, http, tokenizer

HI = [{"role": "user", "content": "hi"}]
AND = [{"role": "user", "content": "and?"}]


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


async def made(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/sessions", json=body)
    assert response.status_code == 200, response.text
    card: dict[str, Any] = response.json()
    return card


async def test_a_session_is_made_under_the_clients_name_or_one_of_ours() -> None:
    async with http() as client:
        named, unnamed = await made(client, session_id="mine"), await made(client)
    assert named["session_id"] == "mine"
    assert unnamed["session_id"].startswith("sess-")
    assert "replica_id" not in named
    assert (named["turns"], named["history_tokens"], named["cached_tokens"]) == (0, 0, 0)


async def test_a_turn_is_answered_as_a_chat_is() -> None:
    targets = ScriptedTargets()
    async with http(targets) as client:
        await made(client, session_id="a/b", messages=[{"role": "system", "content": "be brief"}])
        first = await client.post("/v1/sessions/a/b/turns", json={"messages": HI})
        second = await client.post("/v1/sessions/a/b/turns", json={"messages": AND, "stream": True})
        card = (await client.get("/v1/sessions/a/b")).json()
    assert first.json()["choices"][0]["message"]["content"] == "Hello"
    assert first.headers["x-session-id"] == "a/b"
    chunks = events(second.text)
    assert chunks[-1] == "[DONE]"
    prompt = ids("<|system|>be brief<|user|>hi<|assistant|>")
    assert targets.requests[1].token_ids == (*prompt, 10, 11, 12, *ids("<|user|>and?<|assistant|>"))
    assert card["turns"] == 2


async def test_a_fork_is_a_session_of_its_own() -> None:
    async with http() as client:
        await made(client, session_id="s")
        await client.post("/v1/sessions/s/turns", json={"messages": HI})
        named = (await client.post("/v1/sessions/s/fork", json={"session_id": "t"})).json()
        unnamed = (await client.post("/v1/sessions/s/fork")).json()
        listed = (await client.get("/v1/sessions")).json()["data"]
    assert (named["session_id"], named["parent"], named["turns"]) == ("t", "s", 1)
    assert unnamed["session_id"].startswith("sess-")
    assert {card["session_id"] for card in listed} == {"s", "t", unnamed["session_id"], "s/1", "s2"}


async def test_what_was_said_in_a_session_can_be_read() -> None:
    async with http() as client:
        await made(client, session_id="a/b", messages=[{"role": "system", "content": "be brief"}])
        await client.post("/v1/sessions/a/b/turns", json={"messages": HI})
        said = (await client.get("/v1/sessions/a/b/messages")).json()["data"]
    assert [(message["role"], message["content"]) for message in said] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "Hello"),
    ]


async def test_calls_of_tools_are_read_as_they_are_sent() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "the time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    ]
    async with http() as client:
        await made(client, session_id="s", messages=said)
        assert (await client.get("/v1/sessions/s/messages")).json()["data"] == said


async def test_nothing_was_said_in_a_session_nobody_knows() -> None:
    async with http() as client:
        assert (await client.get("/v1/sessions/nobody/messages")).json()["error"]["code"] == "session_not_found"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/sessions", {"session_id": "s"}, 409, "session_conflict"),
        ("/v1/sessions", {"session_id": " "}, 400, "invalid_request_error"),
        ("/v1/sessions", {"seed": "x"}, 400, "invalid_request_error"),
        ("/v1/sessions", {"messages": [{"role": "bard", "content": "hi"}]}, 400, "invalid_request_error"),
        ("/v1/sessions/s/fork", {"session_id": "s"}, 409, "session_conflict"),
        ("/v1/sessions/nobody/fork", {}, 404, "session_not_found"),
        ("/v1/sessions/nobody/turns", {"messages": HI}, 404, "session_not_found"),
        ("/v1/sessions/s/turns", {"messages": []}, 400, "invalid_request_error"),
        ("/v1/sessions/s/turns", {"messages": HI, "session_id": "t"}, 400, "invalid_request_error"),
    ],
)
async def test_what_makes_no_sense_is_refused(path: str, body: dict[str, Any], status: int, code: str) -> None:
    async with http() as client:
        await made(client, session_id="s")
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_deleted_session_has_no_next_turn() -> None:
    async with http() as client:
        await made(client, session_id="s")
        assert (await client.delete("/v1/sessions/s")).status_code == 200
        assert (await client.post("/v1/sessions/s/turns", json={"messages": HI})).status_code == 404


async def test_kv_on_a_disk_that_replicas_share_is_told_once_and_not_if_it_is_at_hand() -> None:
    targets = ScriptedTargets()
    targets.held = [
        SessionInfo("both", "target-1", 90, False, 900, "disk"),
        SessionInfo("both", "target-2", 80, True, 800, "device"),
        SessionInfo("shared", "target-1", 70, False, 700, "disk"),
        SessionInfo("shared", "target-2", 70, False, 700, "disk"),
    ]
    async with http(targets) as client:
        listed = (await client.get("/v1/sessions")).json()["data"]
        one = (await client.get("/v1/sessions/both")).json()
    assert [(card["session_id"], card["kv_tier"]) for card in listed] == [("both", "device"), ("shared", "disk")]
    assert (one["replica_id"], one["cached_tokens"]) == ("target-2", 80)


async def test_a_session_moves_to_another_replica() -> None:
    async with http() as client:
        moved = await client.post("/v1/sessions/s2/move")
    assert (moved.status_code, moved.json()["replica_id"]) == (200, "target-9")


async def test_a_session_that_is_where_it_shall_go_stays() -> None:
    async with http() as client:
        moved = await client.post("/v1/sessions/s2/move", json={"replica": "target-2"})
    assert moved.json()["replica_id"] == "target-2"


@pytest.mark.parametrize(
    ("session", "body", "status", "message"),
    [
        ("s/1", {}, 409, "session_id: 's/1' stays where it is: being answered"),
        ("s2", {"replica": "target-3"}, 503, "session_id: 's2' stays where it is: without a peer"),
        ("nobody", {}, 404, "session_id: nobody holds a session 'nobody'"),
    ],
)
async def test_a_session_that_cannot_move_says_why(
    session: str, body: dict[str, str], status: int, message: str
) -> None:
    async with http() as client:
        refused = await client.post(f"/v1/sessions/{session}/move", json=body)
    assert (refused.status_code, refused.json()["error"]["message"]) == (status, message)


async def test_a_replica_is_relieved_of_idle_sessions() -> None:
    async with http() as client:
        relief = await client.post("/v1/replicas/target-2/relieve", json={"sessions": 3})
    assert relief.json() == {"object": "relief", "replica_id": "target-2", "moved": {"s2": "target-9"}, "stay": {}}


@pytest.mark.parametrize(
    ("replica", "sessions", "param"), [("target-7", 1, "replica"), ("target-2", 0, "sessions")], ids=["unknown", "none"]
)
async def test_a_relief_that_makes_no_sense_names_the_field(replica: str, sessions: int, param: str) -> None:
    async with http() as client:
        refused = await client.post(f"/v1/replicas/{replica}/relieve", json={"sessions": sessions})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
