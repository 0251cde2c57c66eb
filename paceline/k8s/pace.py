"""How long a command may go on, and its pauses; a test passes both in no time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """From now on, `seconds` long."""

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._end = clock() + seconds

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds)

    @property
    def over(self) -> bool:
        return self._clock() >= self._end

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - self._clock())
