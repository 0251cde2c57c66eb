"""When a call is made again, and after which pause."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from paceline.errors import Overloaded, PacelineError, RequestTimeout, Unavailable


@dataclass(frozen=True, slots=True)
class Retry:
    """`max_attempts` in all, 1 is none again. The pause before attempt k is drawn from 0 to first_s · 2^(k - 2),
    longest_s at most, so that clients refused together do not come back together; a server that says when to come back
    is not asked before."""

    max_attempts: int = 4
    first_s: float = 0.5
    longest_s: float = 8.0


class Attempts:
    """Of one call. `clock` and `draw` (uniform in [0, 1)) are given by tests."""

    def __init__(
        self,
        retry: Retry,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._retry = retry
        self._timeout_s = timeout_s
        self._clock = clock
        self._draw = draw
        self._deadline = clock() + timeout_s
        self._made = 0

    def begin(self) -> float:
        """The seconds that are left for the next attempt. Raises RequestTimeout if there are none."""
        left = self._deadline - self._clock()
        if left <= 0:
            raise RequestTimeout(f"no answer within {self._timeout_s:g} s")
        self._made += 1
        return left

    def pause_after(self, error: PacelineError, *, harmless: bool = True) -> float | None:
        """How long to wait before trying again; None if the error stands.

        `harmless` says that a call whose fate is unknown may be made twice.
        """
        if self._made >= self._retry.max_attempts:
            return None
        if not isinstance(error, Overloaded) and not (harmless and isinstance(error, Unavailable)):
            return None
        longest = min(self._retry.longest_s, self._retry.first_s * 2 ** (self._made - 1))
        pause = max(longest * self._draw(), error.retry_after or 0.0)
        return pause if self._clock() + pause < self._deadline else None
