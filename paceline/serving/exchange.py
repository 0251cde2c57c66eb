"""A target replica's part in hand-offs: it gives when it leaves or is asked to, and takes from others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from paceline.errors import PacelineError
from paceline.serving.departure import Departure
from paceline.serving.handoff import Handoff, Peers, Receiver, Sender
from paceline.serving.streams import Streams
from paceline.sessions.handoff import BUSY, HandoffCounts, Move, Outcome, Receipt, Room

if TYPE_CHECKING:
    from paceline.engine.kv_parts import KVPart
    from paceline.engine.loop import EngineLoop

logger = logging.getLogger("ray.serve")

NOTE_PERIOD_S = 0.5
"""Whoever waits for a replica to leave looks about so often."""


class Exchange:
    """Of one replica.

    `find_peers` gets a function to call with whether this replica still belongs to the running ones, whenever that
    changes. With `within_s` 0, the deadline of a hand-off, there are no peers and nothing is handed over. `note_left`
    may block; it hears how many sessions are still to be handed over when the replica leaves.
    """

    def __init__(
        self,
        replica_id: str,
        loop: EngineLoop,
        find_peers: Callable[[Callable[[bool], None]], Peers],
        *,
        within_s: float,
        grace_s: float,
        note_left: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.streams = Streams()
        self._replica_id, self._loop, self._grace_s = replica_id, loop, grace_s
        self._counts = HandoffCounts()
        self._receiver = Receiver(loop, self._counts)
        self._departure: asyncio.Task[None] | None = None
        self._sender: Sender | None = None
        self._note_left = note_left
        if within_s:
            self._sender = Sender(replica_id, loop, find_peers(self._belongs), within_s, self._counts)

    async def arrival(self, session_id: str | None) -> bool:
        """Before a request is served: wait a moment for its session's KV if that is on its way. Whether it was."""
        return await self._receiver.arrival(session_id)

    async def room(self) -> Room | None:
        """What could be taken; None from a replica that leaves."""
        if self._departure is not None:
            return None
        engine = self._loop.engine
        usage = await asyncio.wrap_future(self._loop.call(engine.kv.usage))
        return Room(self._replica_id, usage.free, usage.cached, engine.num_running + engine.num_waiting)

    def expect(self, move: Move) -> None:
        if move.holder == self._replica_id:
            self._receiver.expect(move.sessions, move.within_s)

    async def take(self, parts: Sequence[KVPart]) -> Receipt:
        return await self._receiver.take(parts)

    async def give(self, sessions: Sequence[str] | None, count: int, to: str | None) -> Outcome:
        """Hand over these sessions, or those used last, at most `count`, and forget them here.

        What is being answered stays.
        """
        if self._sender is None:
            return Outcome(left=dict.fromkeys(sessions or (), "not handed over: sessions.handoff_timeout_s is 0"))
        held, busy = await self._sender.held(), self.streams.sessions()
        free = [name for name in held if name not in busy and name in (sessions or held)]
        handoff = Handoff(self._sender, {name: held[name] for name in free[:count]}, to)
        for name in sessions or ():
            if name not in handoff.held:
                handoff.outcome.left[name] = BUSY if name in busy else "without KV"
        await handoff.announce()
        await handoff.deliver(handoff.held)
        await self._sender.drop(handoff.outcome.arrived)
        return handoff.outcome

    async def finish(self) -> None:
        """The replica ends: wait until what is being handed over has arrived, or its deadline."""
        if self._sender is None:
            return
        self._belongs(False)
        assert self._departure is not None
        await asyncio.wait({self._departure}, timeout=self._sender.within_s)
        await asyncio.to_thread(self._note_left, 0)
        self._sender.peers.stop()

    def numbers(self) -> dict[str, Any]:
        """For /status and /metrics."""
        return asdict(self._counts)

    def _belongs(self, still: bool) -> None:
        """Serve takes a replica out for a moment as well when its configuration changes."""
        if not still and self._departure is None:
            self._departure = asyncio.create_task(self._leave())
        elif still and self._departure is not None:
            self._departure.cancel()
            self._departure = None

    async def _leave(self) -> None:
        assert self._sender is not None
        departure = Departure(self._sender, self._loop, self.streams, self._grace_s)
        noting = asyncio.create_task(self._noting(departure))
        try:
            await departure.run()
        except PacelineError as error:
            logger.warning("leaving: no session is handed over: %s", error.message)
        except Exception:
            logger.exception("leaving: the hand-off failed")
        finally:
            noting.cancel()

    async def _noting(self, departure: Departure) -> None:
        while True:
            await asyncio.to_thread(self._note_left, departure.left)
            await asyncio.sleep(NOTE_PERIOD_S)
