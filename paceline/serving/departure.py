"""What a target replica does with its sessions once it is told to leave.

    told to leave ──► all sessions announced ──► idle ones delivered at once
                                             └─► those being answered: each as its last answer ends,
                                                 or after the grace, cut off, to go on at its new holder

Serve ends the replica when its last request has ended, and kills it at `graceful_shutdown_timeout_s`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
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
        self._handoff: Handoff | None = None

    @property
    def left(self) -> int:
        """Sessions that are still to be handed over, as far as they are known."""
        if self._handoff is None:
            return 0
        outcome = self._handoff.outcome
        return sum(name not in outcome.arrived and name not in outcome.left for name in self._handoff.held)

    async def run(self) -> None:
        """Hand over what can be, within the deadlines of grace and sender; log what became of it."""
        due = time.monotonic() + self._grace_s
        seen: dict[str, int] = {}
        # More than once if requests were on their way when the replica left.
        while (held := await self._unseen(seen)) or self._streams:
            outcome = await self._hand_over(held, due)
            seen |= held | outcome.tokens

    async def _unseen(self, seen: Mapping[str, int]) -> dict[str, int]:
        return {name: tokens for name, tokens in (await self._sender.held()).items() if seen.get(name) != tokens}

    async def _hand_over(self, held: Mapping[str, int], due: float) -> Outcome:
        """These sessions and those being answered, which come first: they are in use."""
        began = time.monotonic()
        busy = self._streams.sessions()
        first = {name: max(tokens, held.get(name, 0)) for name, tokens in busy.items()}
        rest = {name: tokens for name, tokens in held.items() if name not in first}
        self._handoff = handoff = Handoff(self._sender, first | rest, grace_s=max(0.0, due - began))
        await handoff.announce()
        followed = (self._follow(handoff, session, due) for session in (*busy, None))
        await asyncio.gather(handoff.deliver(rest), *followed)
        log_outcome(handoff, time.monotonic() - began)
        return handoff.outcome

    async def _follow(self, handoff: Handoff, session: str | None, due: float) -> None:
        """Deliver a session once its answers are over, or cut off when that is due; None are answers of none."""
        cut = []
        try:
            async with asyncio.timeout(due - time.monotonic()):
                await self._streams.over(session)
        except TimeoutError:
            cut = self._streams.of(session)
        for stream in cut:
            request = stream.request
            await asyncio.wrap_future(self._loop.abort(request.request_id, request.params.n))
        if session is not None:
            await handoff.deliver([session])
        for stream in cut:
            self._streams.fail(stream, LEAVING, self._sender.replica_id)
