"""Sessions keep their KV when target replicas come and go, and on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Server, chat_all, chat_tokens

pytestmark = pytest.mark.serve

SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
WINDOW: dict[str, Any] = {"ctx_size": 64, **SHORT}
LONG = "Tell me about " + ", ".join(f"thing number {n}" for n in range(24)) + "."


@dataclass
class Session:
    """One conversation of appended turns; the last one's answer and the replica that gave it."""

    server: Server
    name: str
    options: dict[str, Any]
    total: int = 0
    replica: str = ""
    route: str = ""
    prefilled: int = 0
    new: int = 0

    def ask(self, content: str = "And then?") -> None:
        body = {"messages": [{"role": "user", "content": content}], **self.options}
        answer = self.server.post(f"/v1/sessions/{self.name}/turns", body)
        usage = answer.raise_for_status().json()["usage"]
        self.replica, self.route = answer.headers["x-paceline-replica"], answer.headers["x-paceline-route"]
        self.prefilled = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        self.new, self.total = usage["prompt_tokens"] - self.total, usage["total_tokens"]

    def move(self, replica: str) -> httpx.Response:
        return self.server.post(f"/v1/sessions/{self.name}/move", {"replica": replica})

    @property
    def kept(self) -> bool:
        """Whether the last turn prefilled only what was new. Of what was said before, the last token alone may be
        missing: it was never fed back."""
        return self.prefilled - self.new in (0, 1)


@dataclass
class Load:
    """Short chats one after the other."""

    server: Server
    statuses: list[int] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._chat, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _chat(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            body = {"messages": [{"role": "user", "content": f"Say {len(self.statuses)}."}], **SHORT}
            self.statuses.append(self.server.post("/v1/chat/completions", body).status_code)


def replicas(server: Server) -> set[str]:
    return {target["replica_id"] for target in server.status()["targets"]}


def opened(server: Server, **options: Any) -> Session:
    session = Session(server, f"handoff-{time.time_ns()}", options)
    server.post("/v1/sessions", {"session_id": session.name}).raise_for_status()
    session.ask(f"My name is {session.name}. {LONG}")  # nobody else said this
    return session


@pytest.fixture
def three(cluster: Server) -> Iterator[Server]:
    """The cluster with three targets, for this test alone."""
    cluster.cluster.scale("Target", 3)
    yield cluster
    cluster.cluster.scale("Target", 2)


@pytest.mark.slow
def test_scaling_3_2_3_under_load_fails_no_request_and_keeps_every_session_s_kv(three: Server) -> None:
    homes, load = sorted(replicas(three)), Load(three)
    sessions = [opened(three, **options) for options in (SHORT, WINDOW) for _ in homes]
    for session, home in zip(sessions, homes * 2, strict=True):
        session.move(home).raise_for_status()
    with load.running():
        three.cluster.scale("Target", 2)
        (gone,) = set(homes) - replicas(three)
        moved = [session for session, home in zip(sessions, homes * 2, strict=True) if home == gone]
        for session in sessions:
            session.ask()
        three.cluster.scale("Target", 3)
        kept = [session.kept for session in sessions]
        for session in sessions:
            session.ask()
    assert kept == [True] * 6
    assert [session.options for session in moved] == [SHORT, WINDOW]
    assert [(session.kept, session.route) for session in sessions] == [(True, "holder")] * 6
    assert set(load.statuses) == {200}
    received = sum(target["handoff"]["received"] for target in three.status()["targets"])
    assert received >= len(moved)


@pytest.mark.slow
async def test_answers_longer_than_a_leaving_replica_waits_go_on_elsewhere_with_their_kv(three: Server) -> None:
    options = {"max_tokens": 250, "ignore_eos": True, "temperature": 0.8, "speculation": False}
    sessions = [opened(three, **SHORT) for _ in range(3)]
    for session, home in zip(sessions, sorted(replicas(three)), strict=True):
        session.move(home).raise_for_status()
    begun, tokens = asyncio.Event(), 0

    def count(new: int) -> None:
        nonlocal tokens
        tokens += new
        if tokens > 30:
            begun.set()

    async def answers(on_tokens: Callable[[int], None]) -> list[tuple[list[int], dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=three.endpoints.http, timeout=120) as client:
            chats = (
                # Text that only the session's own KV begins like.
                chat_tokens(client, f"{each.name}: {LONG}", on_tokens, session_id=each.name, seed=1, **options)
                for each in sessions
            )
            return await asyncio.gather(*chats)

    running = asyncio.create_task(answers(count))
    await asyncio.wait_for(begun.wait(), 60)
    await asyncio.to_thread(three.cluster.scale, "Target", 2)
    disturbed, undisturbed = await running, await answers(lambda _: None)
    assert [tokens for tokens, _ in disturbed] == [tokens for tokens, _ in undisturbed]
    resumed = [info for _, info in disturbed if info.get("resumptions")]
    assert len(resumed) == 1
    assert resumed[0]["cached_tokens"] > 100


def test_a_session_moves_on_demand_and_goes_on_there(server: Server) -> None:
    session = opened(server, **SHORT)
    (other,) = replicas(server) - {session.replica}
    card = session.move(other).raise_for_status().json()
    assert card["replica_id"] == other
    session.ask()
    assert (session.replica, session.route, session.kept) == (other, "holder", True)


@pytest.mark.slow
async def test_what_a_leaving_drafter_computed_is_taken_by_the_other(server: Server) -> None:
    await chat_all(server, [f"{LONG} Begin with number {n}." for n in range(4)], **SHORT)
    server.cluster.scale("Draft", 1)
    (left,) = server.status()["drafts"]
    server.cluster.scale("Draft", 2)
    assert left["handoff"]["received"] > 0
    assert left["handoff"]["bytes_received"] > 0


def test_a_replica_that_dies_before_it_takes_a_session_costs_the_session_nothing(server: Server) -> None:
    session = opened(server, **SHORT)
    (other,) = replicas(server) - {session.replica}
    pids = {target["replica_id"]: target["pid"] for target in server.status()["targets"]}
    os.kill(pids[other], signal.SIGKILL)
    refused, home = session.move(other), session.replica
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
    session.ask()
    assert (session.replica, session.route, session.kept) == (home, "holder", True)
