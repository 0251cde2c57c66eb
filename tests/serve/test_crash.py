"""A target replica is killed while it answers: no client notices, the tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Server, chat_tokens

pytestmark = pytest.mark.serve

FULL: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 42, **FULL}
CHATS: list[tuple[str, dict[str, Any]]] = [
    ("What is the capital of Portugal?", {"temperature": 0, **FULL}),
    ("Explain how a bicycle stays upright.", {"temperature": 0, **FULL}),
    ("Write a haiku about the sea.", SEEDED),
    ("List three uses of copper.", {"frequency_penalty": 1.0, **SEEDED}),
    ("Why is the sky blue?", {"repetition_penalty": 1.3, **SEEDED}),
    ("Give me a recipe for pancakes.", {"logprobs": True, **SEEDED}),
]


async def test_every_stream_of_a_killed_target_completes_with_the_same_tokens(server: Server) -> None:
    undisturbed = await _answers(server)
    produced, due = 0, asyncio.Event()

    def count(new: int) -> None:
        nonlocal produced
        produced += new
        if produced >= len(CHATS) * FULL["max_tokens"] // 4:
            due.set()

    running = asyncio.create_task(_answers(server, count))
    await asyncio.wait_for(due.wait(), 60)
    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=30) as client:
        status = (await client.get("/status")).json()
    victim = max(status["targets"], key=lambda target: int(target["running"]))
    assert victim["running"] > 0
    os.kill(victim["pid"], signal.SIGKILL)
    answers = await running
    assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in undisturbed]
    resumed = [info for _, info in answers if info.get("resumptions")]
    assert len(resumed) > 0
    assert all(info["replica_id"] == victim["replica_id"] for info in resumed)


async def _answers(server: Server, count: Any = lambda _: None) -> list[tuple[list[int], dict[str, Any]]]:
    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=120) as client:
        return await asyncio.gather(*(chat_tokens(client, content, count, **options) for content, options in CHATS))


async def test_a_session_outlives_its_replica(server: Server) -> None:
    turn = {"messages": [{"role": "user", "content": "What is the capital of Portugal?"}], "max_tokens": 8}
    server.post("/v1/sessions", {"session_id": "doomed"}).raise_for_status()
    before = server.post("/v1/sessions/doomed/turns", turn)
    victim = before.raise_for_status().headers["x-paceline-replica"]
    pids = {target["replica_id"]: target["pid"] for target in server.status()["targets"]}
    os.kill(pids[victim], signal.SIGKILL)
    server.wait_for(lambda status: victim not in {target["replica_id"] for target in status["targets"]})
    after = server.post("/v1/sessions/doomed/turns", turn)
    assert (after.status_code, after.headers["x-paceline-route"]) == (200, "holder_gone")
    assert after.json()["usage"]["prompt_tokens"] > before.json()["usage"]["total_tokens"]
