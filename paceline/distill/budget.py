"""How much there is to do: a share of time, or of steps where a run must be the same on every machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass(slots=True)
class Budget:
    """`fraction` goes from 0 to 1. `limit` is in seconds, or in `advance` calls if `counts_steps`.

    `used` carries over from a run that was interrupted.
    """

    limit: float
    counts_steps: bool = False
    used: float = 0.0
    clock: Clock = time.monotonic
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def advance(self) -> None:
        now = self.clock()
        self.used += 1.0 if self.counts_steps else now - self._since
        self._since = now

    @property
    def fraction(self) -> float:
        return min(1.0, self.used / self.limit) if self.limit > 0 else 1.0

    @property
    def spent(self) -> bool:
        return self.fraction >= 1.0
