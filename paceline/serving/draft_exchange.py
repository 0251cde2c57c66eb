"""A draft replica's part in hand-offs: what it has computed of texts goes to its peers when it leaves.

Which drafter the next turn of a session is opened at, its target decides then; any that holds the text's beginning
spares it that much of a prefill.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from paceline.errors import PacelineError
from paceline.serving.handoff import Handoff, Peers, Receiver, Sender, log_outcome
from paceline.sessions.handoff import HandoffCounts, Receipt, Room

if TYPE_CHECKING:
    from paceline.engine.kv_parts import KVPart
    from paceline.engine.loop import DrafterLoop

logger = logging.getLogger("ray.serve")

MAX_ENTRIES = 1024


class DraftExchange:
    """Of one replica. With `within_s` 0, the deadline of a hand-off, nothing is handed over."""

    def __init__(self, replica_id: str, loop: DrafterLoop, find_peers: Callable[[], Peers], *, within_s: float) -> None:
        self._replica_id, self._loop = replica_id, loop
        self._counts = HandoffCounts()
        self._receiver = Receiver(loop, self._counts, anonymous=True)
        self._leaving = False
        self._sender = Sender(replica_id, loop, find_peers(), within_s, self._counts) if within_s else None

    async def room(self) -> Room | None:
        """What could be taken; None from a replica that leaves."""
        if self._leaving:
            return None
        usage = await asyncio.wrap_future(self._loop.call(self._loop.kv.usage))
        return Room(self._replica_id, usage.free, usage.cached, self._loop.drafter.num_sequences)

    async def take(self, parts: Sequence[KVPart]) -> Receipt:
        return await self._receiver.take(parts)

    async def finish(self) -> None:
        """The replica ends and has no streams any more: hand over what can be, within the deadline."""
        self._leaving = True
        if self._sender is None:
            return
        try:
            await self._hand_over(self._sender)
        except PacelineError as error:
            logger.warning("leaving: nothing is handed over: %s", error.message)
        self._sender.peers.stop()

    def numbers(self) -> dict[str, Any]:
        """For /status and /metrics."""
        return asdict(self._counts)

    async def _hand_over(self, sender: Sender) -> None:
        from paceline.engine.kv_parts import name_entries

        began = time.monotonic()
        kv, prefix = self._loop.kv, self._replica_id
        await asyncio.wrap_future(self._loop.call(lambda: name_entries(kv, prefix, MAX_ENTRIES)))
        handoff = Handoff(sender, await sender.held())
        if handoff.held:
            await handoff.announce()
            await handoff.deliver(handoff.held)
        log_outcome(handoff, time.monotonic() - began)
