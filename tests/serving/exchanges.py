"""Exchanges of several replicas in one process: real caches, and a loop that runs what it is given at once."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.kv_parts import KVPart
from paceline.errors import Unavailable
from paceline.serving.exchange import Exchange
from paceline.serving.handoff import Peers
from paceline.sessions.handoff import Move, Receipt, Room

GEOMETRY = KVGeometry(2, 2, 4, torch.float32, torch.device("cpu"))
CAPACITY = 1000


class Loop:
    """As much of an EngineLoop or a DrafterLoop as an exchange looks at; itself the engine and the drafter."""

    def __init__(self) -> None:
        self.kv = SlabKVCache(GEOMETRY, CAPACITY, CAPACITY)
        self.num_running = self.num_waiting = self.num_sequences = 0
        self.aborted: list[str] = []
        self.engine = self.drafter = self

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function())
        return future

    def abort(self, request_id: str, n: int) -> Future[None]:
        return self.call(lambda: self.aborted.append(request_id))


class World(dict[str, "Replica"]):
    """All replicas by name. `routed` is where a router sends a session; a `dead` one fails every call."""

    def __init__(self, *names: str, within_s: float = 5.0, grace_s: float = 5.0) -> None:
        self.routed: dict[str, str] = {}
        self.dead: set[str] = set()
        self.sent: list[tuple[str, list[str]]] = []
        super().__init__({name: Replica(name, self, within_s, grace_s) for name in names})


class Replica(Peers):
    """One replica's exchange, and what it knows of the others."""

    def __init__(self, name: str, world: World, within_s: float, grace_s: float) -> None:
        self.name, self.world, self.loop = name, world, Loop()
        self.on_change: Callable[[bool], None] = lambda _: None
        self.stopped = False
        self.exchange: Any = Exchange(name, self.loop, self._found, within_s=within_s, grace_s=grace_s)  # type: ignore[arg-type]

    @property
    def kv(self) -> SlabKVCache:
        return self.loop.kv

    def hold(self, session: str | None, tokens: int) -> None:
        """An idle session here, or an entry of none."""
        ids = [hash(session) % 1000, *range(tokens - 1)]
        entry = self.kv.reserve([*ids, 0], tokens + 1, session)
        assert entry is not None
        self.kv.append(entry, ids[entry.length :])
        self.kv.release(entry)

    async def leave(self) -> None:
        self.on_change(False)
        await self.exchange.finish()

    async def rooms(self) -> list[Room]:
        found = [await each.exchange.room() for each in self.world.values() if each is not self]
        return [room for room in found if room is not None]

    async def announce(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self.world.routed.update(dict.fromkeys(move.sessions, move.holder))
            holder = self.world[move.holder].exchange
            if isinstance(holder, Exchange):
                holder.expect(move)

    async def send(self, replica: str, parts: Sequence[KVPart]) -> Receipt:
        await asyncio.sleep(0)
        if replica in self.world.dead:
            raise Unavailable("dead")
        self.world.sent.append((replica, [part.session_id for part in parts]))
        return await self.world[replica].exchange.take(pickle.loads(pickle.dumps(parts)))

    def stop(self) -> None:
        self.stopped = True

    def _found(self, on_change: Callable[[bool], None]) -> Replica:
        self.on_change = on_change
        return self
