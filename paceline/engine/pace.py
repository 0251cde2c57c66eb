"""How long a token takes, as measured lately."""

from __future__ import annotations

DECAY = 0.8
"""What the measurements before count for beside a new one."""
RELAXED = 0.98


class Pace:
    """Seconds a token over the latest measurements; None before the first."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    @property
    def seconds_per_token(self) -> float | None:
        return self._seconds / self._tokens if self._tokens else None

    def note(self, tokens: int, seconds: float) -> None:
        self._tokens = DECAY * self._tokens + tokens
        self._seconds = DECAY * self._seconds + seconds

    def relax(self) -> None:
        """Nothing was measured since it was too slow: believe it a little less, so that it is tried again."""
        self._seconds *= RELAXED
