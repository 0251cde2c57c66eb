"""Sessions on a real cluster: recognized, appended to, forked; and where their turns go."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.serve

SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
LONG = "Tell me about " + ", ".join(f"thing number {n}" for n in range(40)) + "."


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def cached(response: httpx.Response) -> int:
    tokens: int = response.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_a_client_that_names_no_session_comes_back_to_its_kv(server: Server) -> None:
    messages = said(LONG)
    first = server.post("/v1/chat/completions", {"messages": messages, **SHORT})
    answer = first.json()["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": answer}, *said("And then?")]
    second = server.post("/v1/chat/completions", {"messages": messages, **SHORT})
    for name in ("x-session-id", "x-paceline-replica"):
        assert second.headers[name] == first.headers[name]
    assert second.headers["x-paceline-route"] == "holder"
    assert cached(second) >= first.json()["usage"]["prompt_tokens"]


def test_appended_turns_prefill_only_what_is_new_and_a_fork_shares_it(server: Server) -> None:
    name = f"serve-{time.time_ns()}"
    server.post("/v1/sessions", {"session_id": name}).raise_for_status()
    opening = f"My name is {name}. {LONG}"  # nobody else said this
    first = server.post(f"/v1/sessions/{name}/turns", {"messages": said(opening), **SHORT})
    usage = first.raise_for_status().json()["usage"]
    server.post(f"/v1/sessions/{name}/fork", {"session_id": f"{name}-fork"}).raise_for_status()
    second = server.post(f"/v1/sessions/{name}/turns", {"messages": said("And then?"), **SHORT})
    forked = server.post(f"/v1/sessions/{name}-fork/turns", {"messages": said("Or else?"), **SHORT})
    # All; the last token only if it came out of a verified run, else it was never fed back.
    assert usage["total_tokens"] - cached(second) in (0, 1)
    assert cached(forked) >= cached(second)  # both go on with the template's words for a user's turn
    assert [each.headers["x-paceline-route"] for each in (second, forked)] == ["holder", "prefix"]
    card = server.get(f"/v1/sessions/{name}-fork")
    assert (card["parent"], card["turns"]) == (name, 2)
    assert card["kv_bytes"] > 0
