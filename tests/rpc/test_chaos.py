"""Drafters in processes of their own, killed, stopped and moved far away while streams run: no stream notices more
than one deadline, none sees an error, every token is the one of plain decoding."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from paceline.speculation.remote import LATE_BEFORE_REST
from tests.rpc.replicas import PATIENCE_S, SEEDED, TargetReplica, metrics, plain, target_replica, tokens, until

TIMEOUT_S = 1.0
STOPPED_S = 5.0
LENGTH = 200
REQUESTS: list[dict[str, Any]] = [{"name": str(n), "max_tokens": LENGTH, **SEEDED, "seed": n} for n in range(3)]


@functools.cache
def expected(seed: int) -> list[int]:
    return plain(**{name: value for name, value in REQUESTS[seed].items() if name != "name"})


class DraftProcess:
    """A draft replica that can be sent signals."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, "-m", "tests.rpc.draft_process", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._answer().strip()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def held(self) -> dict[str, int]:
        """What it holds now."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        found: dict[str, int] = json.loads(self._answer())
        return found

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.asynccontextmanager
async def draft_process(port: int = 0) -> AsyncIterator[DraftProcess]:
    made = await asyncio.to_thread(DraftProcess, port)
    try:
        yield made
    finally:
        await asyncio.to_thread(made.end)


@pytest.fixture(scope="module")
def survivor() -> Iterator[DraftProcess]:
    """A drafter for all tests here: whatever they do to it, it lives."""
    made = DraftProcess()
    yield made
    made.end()


class Link:
    """A TCP proxy that holds every byte back for `delay_s`, in each direction."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.delay_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, ours), (theirs, writer)):
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
            for work in (self._take(source, queue), self._give(queue, sink)):
                self._tasks.add(asyncio.create_task(work))

    async def _take(self, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await source.read(1 << 16):
            queue.put_nowait((time.monotonic() + self.delay_s, data))
        queue.put_nowait((time.monotonic(), b""))

    async def _give(self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not data:
                sink.close()
                return
            sink.write(data)
            await sink.drain()


async def answer_all(target: TargetReplica, on_progress: Callable[[int], object] = lambda _: None) -> int:
    """All requests at once, each compared with plain decoding; how many candidates were drafted for them."""
    produced = [0] * len(REQUESTS)

    def progress(number: int, so_far: int) -> None:
        produced[number] = so_far
        on_progress(sum(produced))

    answers = await asyncio.gather(
        *(target.generate(functools.partial(progress, n), **params) for n, params in enumerate(REQUESTS))
    )
    assert [tokens(deltas) for deltas in answers] == [expected(n) for n in range(len(REQUESTS))]
    return sum(metrics(deltas).drafted for deltas in answers)


async def drafts_again(target: TargetReplica) -> None:
    """Answer until candidates take part again."""
    async with asyncio.timeout(PATIENCE_S):
        while not await answer_all(target):
            pass


async def nothing_is_held(draft: DraftProcess) -> None:
    async with asyncio.timeout(PATIENCE_S):
        held = {"sequences": 1}
        while held["sequences"] or held["in_use"]:
            held = await asyncio.to_thread(draft.held)


def at_a_third(act: Callable[[], object]) -> Callable[[int], None]:
    """Once a third of all tokens is there."""
    done = False

    def watch(produced: int) -> None:
        nonlocal done
        if not done and produced >= LENGTH * len(REQUESTS) // 3:
            done = True
            act()

    return watch


def check_waits(target: TargetReplica, deadlines: int) -> None:
    """No step waited beyond its deadline, and few reached it. The factor is for a busy machine."""
    stats = target.proposer.stats
    assert stats.longest_wait_s <= 2 * TIMEOUT_S
    assert stats.missed <= deadlines
    target.proposer.check()


@pytest.fixture
async def target() -> AsyncIterator[TargetReplica]:
    async with target_replica(timeout_s=TIMEOUT_S) as made:
        yield made


@pytest.mark.slow
async def test_a_drafter_killed_in_the_middle_of_drafting(target: TargetReplica, survivor: DraftProcess) -> None:
    """The other one takes its sequences; one that comes back at the same address is used again."""
    async with draft_process() as victim:
        await target.connect(victim.address, survivor.address)
        assert await answer_all(target, at_a_third(lambda: victim.send(signal.SIGKILL))) > 0
        assert await answer_all(target) > 0
        check_waits(target, deadlines=LATE_BEFORE_REST)
        assert (target.proposer.stats.links_lost, target.proposer.link_ids) == (1, [survivor.address])
        await nothing_is_held(survivor)
    async with draft_process(int(victim.address.rpartition(":")[2])) as again:
        target.pool.set_members({again.address: again.address})  # the survivor gets no more
        await until(lambda: again.address in target.proposer.link_ids)
        await drafts_again(target)
        assert (await asyncio.to_thread(again.held))["drafted"] > 0
        await nothing_is_held(again)


@pytest.mark.slow
async def test_a_drafter_stopped_for_five_seconds(target: TargetReplica, survivor: DraftProcess) -> None:
    await target.connect(survivor.address)
    assert await answer_all(target, at_a_third(lambda: survivor.send(signal.SIGSTOP))) > 0
    stopped = time.monotonic()
    while time.monotonic() - stopped < STOPPED_S:
        await answer_all(target)
    check_waits(target, deadlines=LATE_BEFORE_REST)
    survivor.send(signal.SIGCONT)
    await drafts_again(target)
    await nothing_is_held(survivor)


@pytest.mark.slow
async def test_a_drafter_that_moves_a_hundred_milliseconds_away(target: TargetReplica, survivor: DraftProcess) -> None:
    link = Link(survivor.address)
    await target.connect(await link.start())
    assert await answer_all(target, at_a_third(lambda: setattr(link, "delay_s", 0.1))) > 0
    assert await answer_all(target) > 0
    check_waits(target, deadlines=2 * LATE_BEFORE_REST)
    assert target.proposer.stats.links_lost == 0
    await nothing_is_held(survivor)
    await link.stop()
