"""Who was refused, since every queue was full, and tries again: first come, first served."""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass, fields

from paceline.autoscaling.simulate.traces import Arrivals


@dataclass(frozen=True, slots=True)
class Crowd:
    """Requests together with their tokens; `follows` of them continue a session."""

    requests: float = 0.0
    prompt: float = 0.0
    output: float = 0.0
    follows: float = 0.0
    follow_prompt: float = 0.0
    follow_cached: float = 0.0

    def part(self, share: float) -> Crowd:
        return Crowd(*(share * amount for amount in astuple(self)))

    def __add__(self, other: Crowd) -> Crowd:
        return Crowd(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


NOBODY = Crowd()
NAMES = tuple(field.name for field in fields(Crowd))


class Front:
    """Before the replicas."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._columns = [getattr(arrivals, name).tolist() for name in NAMES]
        self._crowds: deque[tuple[float, Crowd]] = deque()
        self.waiting = 0.0

    def come(self, n: int, now: float) -> None:
        """Those of tick number `n`."""
        crowd = Crowd(*(column[n] for column in self._columns))
        if crowd.requests > 0:
            self._crowds.append((now, crowd))
            self.waiting += crowd.requests

    def take(self, room: float, now: float) -> tuple[Crowd, float]:
        """Up to `room` requests, and how long they had waited on average."""
        taken, waited = NOBODY, 0.0
        while self._crowds and taken.requests < room - 1e-9:
            came, crowd = self._crowds.popleft()
            share = min(1.0, (room - taken.requests) / crowd.requests)
            if share < 1.0:
                self._crowds.appendleft((came, crowd.part(1.0 - share)))
            part = crowd if share == 1.0 else crowd.part(share)
            taken, waited = taken + part, waited + part.requests * (now - came)
        self.waiting = max(0.0, self.waiting - taken.requests) if self._crowds else 0.0
        return taken, waited / taken.requests if taken.requests else 0.0
