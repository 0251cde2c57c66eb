"""A request that outlives its replica: when one is lost, the answer goes on at another, where the client has it.

    client   Accepted ── delta ── delta ─────────────────── delta ── delta, finished
    first    Accepted ── delta ── delta ── ✗ (delta)
    second                                  Accepted ── delta ── delta, finished
                                            takes the prompt and the output so far, without KV by a prefill

The seed is fixed and noise belongs to positions, so the second replica draws what the first would have drawn, and a
delta that was lost is drawn again. No token reaches the client twice: what counts is what was passed on from here.
Under rejection sampling the tokens depend on the drafts, so there the rest is another draw of the same distribution.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import cast

from paceline.errors import EngineError, Overloaded, PacelineError, Unavailable
from paceline.telemetry.requests import named
from paceline.types import Accepted, Delta, Failure, Frame, Metrics, Request

logger = logging.getLogger(__name__)

LOST = (Unavailable, EngineError)
"""Errors of a replica rather than of the request. A request that breaks engines ends at the limit all the same."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
"""Before going on after the second loss or refusal, and twice as long after each further one until it is the longest;
after the first, there is no reason to wait."""


async def resuming(
    generate: Callable[[Request], AsyncIterator[Frame]],
    request: Request,
    limit: int,
    *,
    seen: RouterCounts | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[Frame, None]:
    """The frames of a request, from as many replicas as it takes; at most `limit` losses are made good.

    A failure is raised. A replica too busy to go on is asked again, which is no loss, as is one that ends and says so
    before it accepts: it may be the only one, and the next is being built. The caller's deadline ends it. `seen`
    counts what happens.
    """
    answer = _Answer(request, seen or RouterCounts(), clock)
    while not answer.complete:
        try:
            frames = cast(AsyncGenerator[Frame, None], generate(answer.attempt()))
            async with aclosing(frames):
                async for frame in frames:
                    if (passed_on := answer.note(frame)) is not None:
                        yield passed_on
            if not answer.complete:
                raise Unavailable("the replica ended the answer before it was complete; try again")
        except PacelineError as error:
            if answer.complete:
                return
            pause = answer.pause_after(error, limit)
            if pause is None:
                raise
            await asyncio.sleep(pause)


@dataclass(slots=True)
class RouterCounts:
    """Of all requests of one router: acceptances by the reason for their place, and losses made good."""

    routes: Counter[str] = field(default_factory=Counter)
    resumptions: int = 0


class _Answer:
    """What the client has been given, and how often it took another replica."""

    def __init__(self, request: Request, seen: RouterCounts, clock: Callable[[], float]) -> None:
        self._request = request
        self._seen = seen
        self._clock = clock
        self._began = self._attempt_began = clock()
        self._outputs: list[list[int] | None] = [[] for _ in range(request.params.n)]
        self._ttft_s: dict[int, float] = {}
        self._accepted = False
        self._replica: str | None = None
        self._avoid: list[str] = []
        self._refused = False
        self._losses = self._attempts = self._refusals = 0

    @property
    def complete(self) -> bool:
        return all(output is None for output in self._outputs)

    def attempt(self) -> Request:
        """The request as the next replica gets it; under an id of its own, if a replica still holds the last one."""
        self._attempt_began = self._clock()
        self._replica = None
        self._refused = False
        self._attempts += 1
        if self._attempts == 1:
            return self._request
        outputs = tuple(None if output is None else tuple(output) for output in self._outputs)
        name = f"{self._request.request_id}+{self._attempts - 1}"
        return replace(self._request, request_id=name, resumed=outputs, avoid=tuple(self._avoid))

    def note(self, frame: Frame) -> Frame | None:
        """The frame as the client gets it, or None if it has no need of it. Raises a failure's error."""
        if isinstance(frame, Failure):
            self._refused = self._replica is None  # nobody accepted this attempt
            self._replica = frame.replica_id or self._replica
            raise frame.error()
        if isinstance(frame, Accepted):
            self._seen.routes[frame.route] += bool(frame.route)
            repeated = self._accepted and self._replica is None
            self._replica, self._accepted = frame.replica_id, True
            return None if repeated else frame
        return self._note_delta(frame)

    def pause_after(self, error: PacelineError, limit: int) -> float | None:
        """How long to wait before the next attempt, in seconds; None if there shall be none."""
        if isinstance(error, Overloaded) and self._losses:
            return error.retry_after or 1.0
        refused = self._refused and isinstance(error, Unavailable) and limit > 0
        if not refused and (not isinstance(error, LOST) or self._losses >= limit):
            return None
        if self._replica is not None and self._replica not in self._avoid:
            self._avoid.append(self._replica)
        if refused:
            self._refusals += 1
            return _pause(self._refusals)
        told = sum(len(output or ()) for output in self._outputs)
        logger.warning(
            "%s: going on after %d tokens: %s",
            self._request.request_id,
            told,
            error.message,
            extra=named(self._request),
        )
        self._losses += 1
        self._seen.resumptions += 1
        return _pause(self._losses)

    def _note_delta(self, delta: Delta) -> Delta:
        output = self._outputs[delta.index]
        if output is not None:
            output.extend(delta.token_ids)
        self._ttft_s.setdefault(delta.index, self._clock() - self._began)
        if not delta.finished:
            return delta
        self._outputs[delta.index] = None
        if not self._losses or delta.metrics is None:
            return delta
        return replace(delta, metrics=self._whole(delta.metrics, delta.index))

    def _whole(self, last: Metrics, index: int) -> Metrics:
        """The times of the whole request, of those that its last replica saw."""
        before = self._attempt_began - self._began
        return replace(last, ttft_s=self._ttft_s[index], total_s=before + last.total_s, resumptions=self._losses)


def _pause(count: int) -> float:
    """After so many of a kind, in seconds."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(count - 2, 10)) if count > 1 else 0.0
