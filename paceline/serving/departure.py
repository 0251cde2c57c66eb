"""What a target replica does with its sessions once it is told to leave.

    told to leave ──► all sessions announced ──► idle ones delivered at once
                                             └─► those being answered: each as its last answer ends,
                                                 or after the grace, cut off, to go on at its new holder

Serve ends the replica when its last request has ended, and kills it at `graceful_shutdown_timeout_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time

from paceline.errors import Unavailable
from paceline.serving.handoff import Handoff, Sender
from paceline.serving.streams import Streams
from paceline.sessions.handoff import Outcome

logger = logging.getLogger("ray.serve")
"""Serve keeps what a replica says here, at this level, in the replica's log."""


LEAVING = Unavailable("the replica serving this request is leaving; send it again")


class Departure:
    """One replica's. `grace_s` is how long running answers may go on here."""

    def __init__(self, sender: Sender, streams: Streams, grace_s: float) -> None:
        self._sender, self._streams, self._grace_s = sender, streams, grace_s

    async def run(self) -> Outcome:
        """Hand over what can be, within the deadlines of grace and sender; log what became of it."""
        began = time.monotonic()
        busy, held = self._streams.sessions(), await self._sender.held()
        first = {name: max(tokens, held.get(name, 0)) for name, tokens in busy.items()}
        handoff = Handoff(self._sender, first | {name: held[name] for name in held if name not in first})
        if handoff.held:
            await handoff.announce()
        idle = [name for name in handoff.held if name not in busy]
        followed = (self._follow(handoff, session) for session in (*busy, None))
        await asyncio.gather(handoff.deliver(idle), *followed)
        _log(handoff, time.monotonic() - began)
        return handoff.outcome

    async def _follow(self, handoff: Handoff, session: str | None) -> None:
        """Deliver a session once its answers are over, or cut off where the grace is; None are answers of none."""
        cut = []
        try:
            async with asyncio.timeout(self._grace_s):
                await self._streams.over(session)
        except TimeoutError:
            cut = self._streams.of(session)
        for stream in cut:
            await self._sender.abort(stream.request)
        if session is not None:
            await handoff.deliver([session])
        for stream in cut:
            stream.fail(LEAVING, self._sender.replica_id)


def _log(handoff: Handoff, seconds: float) -> None:
    outcome, peers = handoff.outcome, len(set(handoff.outcome.arrived.values()))
    left = f"; left behind: {outcome.why()}" if outcome.left else ""
    logger.info(
        "leaving: %d of %d sessions handed over to %d peers: %d tokens, %.1f MB, %.2f s%s",
        len(outcome.arrived),
        len(handoff.held),
        peers,
        outcome.tokens,
        outcome.bytes / 1e6,
        seconds,
        left,
    )
