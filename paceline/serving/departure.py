"""What a target replica does with its sessions once it is told to leave.

    told to leave ──► all sessions announced ──► idle ones delivered at once
                                             └─► those being answered: each as its last answer ends,
                                                 or after the grace, cut off, to go on at its new holder

Serve ends the replica when its last request has ended, and kills it at `graceful_shutdown_timeout_s`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from paceline.errors import Unavailable
from paceline.serving.handoff import Handoff, Sender, log_outcome
from paceline.serving.streams import Streams
from paceline.sessions.handoff import Outcome

if TYPE_CHECKING:
    from paceline.engine.loop import EngineLoop


LEAVING = Unavailable("the replica serving this request is leaving; send it again")


class Departure:
    """One replica's. `grace_s` is how long running answers may go on here."""

    def __init__(self, sender: Sender, loop: EngineLoop, streams: Streams, grace_s: float) -> None:
        self._sender, self._loop, self._streams, self._grace_s = sender, loop, streams, grace_s

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
        log_outcome(handoff, time.monotonic() - began)
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
            request = stream.request
            await asyncio.wrap_future(self._loop.abort(request.request_id, request.params.n))
        if session is not None:
            await handoff.deliver([session])
        for stream in cut:
            stream.fail(LEAVING, self._sender.replica_id)
