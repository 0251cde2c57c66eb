"""How a target replica gives sessions to its peers, and takes theirs. Everything of Ray's is behind `Peers`."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from paceline.errors import PacelineError, Unavailable
from paceline.sessions.handoff import HandoffCounts, Move, Outcome, Receipt, Room, by_holder, plan, wanted_first

if TYPE_CHECKING:
    # torch takes seconds to import; the application builder imports this module without it.
    from paceline.engine.kv_cache import KVCache
    from paceline.engine.kv_parts import KVPart

logger = logging.getLogger("ray.serve")
"""Serve keeps what a replica says here, at this level, in the replica's log."""

T = TypeVar("T")

BATCH_BYTES = 16 << 20
"""Of one message, and of what an engine writes between two of its steps: about 10 ms of copying."""
ARRIVAL_WAIT_S = 2.0
"""A request waits so long for its session's KV, which is on its way, before it is prefilled instead."""
STALLED_S = 10.0
"""A session whose parts stop coming, and that nobody announced, is given up after so long."""


class KVLoop(Protocol):
    """A thread that owns a KV cache, be it a target's or a drafter's."""

    @property
    def kv(self) -> KVCache: ...

    @property
    def call(self) -> Call: ...


class Call(Protocol):
    def __call__(self, function: Callable[[], T], /) -> Future[T]: ...


class Peers(Protocol):
    """The other replicas of a deployment, and the routers."""

    @abstractmethod
    async def rooms(self) -> list[Room]:
        """Of every living peer whose KV means the same as ours; none if there is no such peer."""

    @abstractmethod
    async def announce(self, moves: Sequence[Move]) -> None:
        """Tell the routers, and through them the new holders."""

    @abstractmethod
    async def send(self, replica: str, parts: Sequence[KVPart]) -> Receipt:
        """Raises Unavailable if that replica is lost."""

    @abstractmethod
    def stop(self) -> None:
        """No more is wanted of them."""


class Sender:
    """What every hand-off of one replica needs."""

    def __init__(
        self, replica_id: str, loop: KVLoop, peers: Peers, within_s: float, counts: HandoffCounts | None = None
    ) -> None:
        self.replica_id, self.peers, self.within_s = replica_id, peers, within_s
        self.counts = counts or HandoffCounts()
        self._loop = loop

    async def held(self) -> dict[str, int]:
        """Tokens held by session, the latest used first."""
        kv = self._loop.kv
        sessions = await asyncio.wrap_future(self._loop.call(kv.sessions))
        return {name: tokens for name, (tokens, _) in reversed(sessions.items())}

    async def parts(self, session_id: str) -> list[KVPart]:
        """What is held of a session, ready to be sent; nothing if it is gone."""
        from paceline.engine.kv_parts import cut

        kv = self._loop.kv
        export = await asyncio.wrap_future(self._loop.call(lambda: kv.export_session(session_id)))
        return [] if export is None else await asyncio.to_thread(lambda: list(cut(export, BATCH_BYTES)))

    async def drop(self, sessions: Iterable[str]) -> None:
        """Forget idle KV."""
        kv = self._loop.kv
        for session_id in sessions:
            await asyncio.wrap_future(self._loop.call(partial(kv.drop_session, session_id)))


@dataclass(eq=False)
class Handoff:
    """Some sessions on their way: announced all at once, delivered in any order.

    `held` has tokens by session, those first that are wanted first; `to` names the only replica to take them. Some
    may be delivered only `grace_s` after the announcement.
    """

    sender: Sender
    held: Mapping[str, int]
    to: str | None = None
    grace_s: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)
    _holders: dict[str, str] = field(default_factory=dict)
    _lost: set[str] = field(default_factory=set)

    async def announce(self, sessions: Collection[str] | None = None) -> None:
        """Choose a holder for each of them, and say so. From then on follow-ups go there."""
        chosen = {name: self.held[name] for name in (self.held if sessions is None else sessions)}
        rooms = await self._rooms() if chosen else []
        holders = plan(chosen, rooms)
        self._holders.update(holders)
        why = "without room" if rooms else "without a peer"
        self.outcome.left.update({name: why for name in chosen if name not in holders})
        sources, within_s = (self.sender.replica_id, *sorted(self._lost)), self.grace_s + self.sender.within_s
        moves = [Move(tuple(share), sources, holder, within_s) for holder, share in by_holder(holders).items()]
        if moves:
            try:
                await self.sender.peers.announce(moves)
            except Unavailable as error:
                logger.warning("hand-off: no router is told: %s", error.message)

    async def deliver(self, sessions: Iterable[str]) -> None:
        """Send announced sessions; those of a peer that is lost on the way go to the others."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.sender.within_s):
                await self._deliver(list(sessions))
        except TimeoutError:
            self.outcome.left.update(dict.fromkeys(self._open(sessions), "out of time"))
        finally:
            self.sender.counts.seconds += time.monotonic() - began

    async def _deliver(self, sessions: Sequence[str]) -> None:
        while shares := by_holder({name: self._holders[name] for name in self._open(sessions)}):
            await asyncio.gather(*(self._send(holder, share) for holder, share in shares.items()))
            if undelivered := self._open(sessions):
                await self.announce(undelivered)

    async def _send(self, holder: str, sessions: Iterable[str]) -> None:
        """One peer's share, in bounded messages; those first that somebody waits for there."""
        queue = list(sessions)
        parts: list[KVPart] = []
        try:
            while queue or parts:
                while queue and _size(parts) < BATCH_BYTES:
                    parts += await self._parts(queue.pop(0))
                batch, parts = _first(parts)
                if not batch:
                    continue
                receipt = await self.sender.peers.send(holder, batch)
                self._note(holder, batch, receipt)
                parts = [part for part in parts if part.session_id not in receipt.refused]
                queue = wanted_first(queue, receipt.wanted)
        except Unavailable as error:
            logger.warning("hand-off: peer %s is lost: %s", holder, error.message)
            self._lost.add(holder)

    async def _parts(self, session: str) -> list[KVPart]:
        try:
            parts = await self.sender.parts(session)
        except PacelineError as error:
            logger.warning("hand-off: %s is not exported: %s", session, error.message)
            parts = []
        if not parts:
            self.outcome.left[session] = "without KV"
        return parts

    def _note(self, holder: str, batch: Sequence[KVPart], receipt: Receipt) -> None:
        size, counts = _size(batch), self.sender.counts
        counts.bytes_sent += size
        counts.sent += len(receipt.arrived)
        counts.failed += len(receipt.refused)
        self.outcome.bytes += size
        self.outcome.tokens.update({part.session_id: part.held for part in batch if part.session_id in receipt.arrived})
        self.outcome.arrived.update(dict.fromkeys(receipt.arrived, holder))
        self.outcome.left.update(dict.fromkeys(receipt.refused, "refused"))

    def _open(self, sessions: Iterable[str]) -> list[str]:
        """Neither arrived nor given up."""
        return [name for name in sessions if name not in self.outcome.arrived and name not in self.outcome.left]

    async def _rooms(self) -> list[Room]:
        """Of those that may take them."""
        try:
            rooms = await self.sender.peers.rooms()
        except Unavailable as error:
            logger.warning("hand-off: no peer is reached: %s", error.message)
            return []
        return [room for room in rooms if room.replica not in self._lost and self.to in (None, room.replica)]


def log_outcome(handoff: Handoff, seconds: float) -> None:
    """One line about a replica that leaves."""
    outcome, peers = handoff.outcome, len(set(handoff.outcome.arrived.values()))
    left = f"; left behind: {outcome.why()}" if outcome.left else ""
    logger.info(
        "leaving: %d of %d sessions handed over to %d peers: %d tokens, %.1f MB, %.2f s%s",
        len(outcome.arrived),
        len(handoff.held),
        peers,
        sum(outcome.tokens.values()),
        outcome.bytes / 1e6,
        seconds,
        left,
    )


class Receiver:
    """Takes the sessions of peers, and knows which are to come; if `anonymous`, as entries of no session."""

    def __init__(self, loop: KVLoop, counts: HandoffCounts, *, anonymous: bool = False) -> None:
        from paceline.engine.kv_parts import KVAssembly

        self._loop, self._counts = loop, counts
        self._assembly = KVAssembly(loop.kv, anonymous=anonymous)
        self._expected: dict[str, _Expected] = {}

    def expect(self, sessions: Iterable[str], within_s: float) -> None:
        """These are on their way."""
        events = asyncio.get_running_loop()
        for name in sessions:
            expiry = events.call_later(within_s, self._expire, name)
            if (known := self._expected.get(name)) is not None:
                known.expiry.cancel()
                known.expiry = expiry
            else:
                self._expected[name] = _Expected(expiry)

    async def arrival(self, session_id: str | None) -> bool:
        """Wait a moment for a session that is on its way; else return at once. Whether it was."""
        expected = self._expected.get(session_id) if session_id is not None else None
        if expected is None:
            return False
        expected.waiting = True
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVAL_WAIT_S):
                await expected.settled.wait()
        return True

    async def take(self, parts: Sequence[KVPart]) -> Receipt:
        """Write parts between two steps of the engine."""
        self.expect({part.session_id for part in parts} - self._expected.keys(), STALLED_S)
        arrived, refused = await asyncio.wrap_future(self._loop.call(lambda: self._write(parts)))
        for name in (*arrived, *refused):
            self._settle(name)
        self._counts.received += len(arrived)
        self._counts.bytes_received += _size(parts)
        return Receipt(tuple(arrived), tuple(refused), tuple(name for name, it in self._expected.items() if it.waiting))

    def _write(self, parts: Sequence[KVPart]) -> tuple[list[str], list[str]]:
        """In the engine's thread. Sessions that are whole now, and those that cannot be taken."""
        arrived, refused = [], []
        for part in parts:
            if part.session_id in refused:
                continue
            if not self._assembly.take(part):
                refused.append(part.session_id)
            elif part.last:
                arrived.append(part.session_id)
        return arrived, refused

    def _settle(self, session_id: str) -> None:
        if (expected := self._expected.pop(session_id, None)) is not None:
            expected.expiry.cancel()
            expected.settled.set()

    def _expire(self, session_id: str) -> None:
        self._counts.missing += 1
        self._settle(session_id)
        self._loop.call(lambda: self._assembly.give_up(session_id))


@dataclass(eq=False, slots=True)
class _Expected:
    """A session on its way; `waiting` is whether a request came for it."""

    expiry: asyncio.TimerHandle
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: bool = False


def _size(parts: Iterable[KVPart]) -> int:
    return sum(part.num_bytes for part in parts)


def _first(parts: list[KVPart]) -> tuple[list[KVPart], list[KVPart]]:
    """As many as fit in one message, at least one; and the rest."""
    size, count = 0, 0
    for part in parts:
        size += part.num_bytes
        if count and size > BATCH_BYTES:
            break
        count += 1
    return parts[:count], parts[count:]
