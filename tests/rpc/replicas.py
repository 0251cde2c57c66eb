"""Replicas without Serve: a drafter behind a real server, an engine behind a pool of real streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from paceline.engine.loop import DrafterLoop, EngineLoop
from paceline.rpc.draft_client import DraftPool
from paceline.rpc.draft_credentials import OPEN, DraftCredentials
from paceline.rpc.draft_server import DraftService, start_draft_server
from paceline.speculation.frames import Hello
from paceline.speculation.remote import RemoteProposer
from paceline.speculation.telemetry import DraftedSequence
from paceline.types import Delta, Failure, Metrics
from tests import schemas, tiny

MODEL = tiny.tiny_llama()
OTHER = tiny.tiny_llama(seed=7)
PROMPT = tiny.prompt(9)
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
HOST = "127.0.0.1"
FINGERPRINT = "tiny"
PATIENCE_S = 60.0
LONG_S = 30.0
"""A draft timeout that a healthy drafter never meets, however busy this machine is."""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (what is awaited changes in other threads)
            await asyncio.sleep(0.005)


class DraftReplica:
    """A drafter, its thread and its server, on a port that stays the same."""

    def __init__(
        self,
        model: Any = MODEL,
        fingerprint: str = FINGERPRINT,
        credentials: DraftCredentials = OPEN,
        on_close: Callable[[DraftedSequence], object] | None = None,
    ) -> None:
        drafter = tiny.drafter_for(model)
        drafter.grammars = schemas.grammars()
        self.loop = DrafterLoop(drafter, on_close)
        self.service = DraftService(self.loop, Hello("draft", "tiny-draft", fingerprint), credentials)
        self.address = ""

    async def start(self) -> None:
        port = int(self.address.rpartition(":")[2] or 0)
        self._server, self.address = await start_draft_server(self.service, HOST, port)

    async def kill(self) -> None:
        await self._server.stop(grace=None)

    @property
    def sequences(self) -> int:
        return self.loop.drafter.num_sequences


@asynccontextmanager
async def draft_replica(
    model: Any = MODEL,
    fingerprint: str = FINGERPRINT,
    credentials: DraftCredentials = OPEN,
    on_close: Callable[[DraftedSequence], object] | None = None,
) -> AsyncIterator[DraftReplica]:
    made = DraftReplica(model, fingerprint, credentials, on_close)
    await made.start()
    try:
        yield made
    finally:
        await made.kill()
        made.loop.stop()


class TargetReplica:
    """An engine in its thread, fed by a pool of draft streams."""

    def __init__(self, name: str = "target", timeout_s: float = LONG_S, credentials: DraftCredentials = OPEN) -> None:
        self.proposer = RemoteProposer(timeout_s)
        self.pool = DraftPool(self.proposer, Hello(name, "tiny-target", FINGERPRINT), credentials)
        engine = tiny.engine_for(MODEL, proposer=self.proposer)
        engine.grammars = schemas.grammars()
        self.loop = EngineLoop(engine)

    async def connect(self, *addresses: str) -> None:
        """Wait until a stream to each is up."""
        self.pool.set_members({address: address for address in addresses})
        await until(lambda: len(self.proposer.link_ids) == len(addresses))

    async def generate(self, on_delta: Callable[[int], object] = lambda _: None, **params: Any) -> list[Delta]:
        """One request's deltas. `on_delta` hears, in this event loop, how many tokens there are so far."""
        deltas: asyncio.Queue[Delta | Failure] = asyncio.Queue()
        events = asyncio.get_running_loop()
        self.loop.submit(
            tiny.request(PROMPT, **params), lambda delta: events.call_soon_threadsafe(deltas.put_nowait, delta)
        )
        found: list[Delta] = []
        while not found or not found[-1].finished:
            delta = await asyncio.wait_for(deltas.get(), PATIENCE_S)
            assert isinstance(delta, Delta)
            found.append(delta)
            on_delta(sum(len(each.token_ids) for each in found))
        return found


@asynccontextmanager
async def target_replica(
    name: str = "target", timeout_s: float = LONG_S, credentials: DraftCredentials = OPEN
) -> AsyncIterator[TargetReplica]:
    made = TargetReplica(name, timeout_s, credentials)
    try:
        yield made
    finally:
        await made.pool.close()
        await asyncio.to_thread(made.loop.stop)


def tokens(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def metrics(deltas: Sequence[Delta]) -> Metrics:
    assert deltas[-1].metrics is not None
    return deltas[-1].metrics


def plain(**params: Any) -> list[int]:
    return tiny.run(tiny.engine_for(MODEL), tiny.request(PROMPT, **params))["r"]
