"""The prompt tokens that wait to be computed, and how long that will take: what a full queue is told by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from paceline.engine.pace import Pace
from paceline.errors import EngineError, Overloaded

LEAST_RETRY_S = 1.0


@dataclass(slots=True)
class Backlog:
    """An estimate for each waiting sequence, made when it began to wait: its tokens less those whose KV was held.

    `limit` bounds their sum; where it is None, `seconds` at the measured pace do, but never below `least` tokens. With
    neither there is no bound. A request is let in past the bound if nobody waits: else it would never run.
    """

    limit: int | None = None
    seconds: float | None = None
    least: int = 0
    pace: Pace = field(default_factory=Pace)
    tokens: int = 0
    _waiting: dict[int, int] = field(default_factory=dict)

    @property
    def bound(self) -> int | None:
        """In tokens, as of now."""
        if self.limit is not None or self.seconds is None:
            return self.limit
        per_token = self.pace.seconds_per_token
        return self.least if not per_token else max(self.least, int(self.seconds / per_token))

    def check_room(self, tokens: int, ahead: int) -> None:
        """Raise Overloaded if so many more would be too many, with the seconds until enough is computed. `ahead` are
        tokens that running sequences still have to compute first."""
        bound = self.bound
        if bound is None or not self._waiting or self.tokens + tokens <= bound:
            return
        raise Overloaded(
            f"{self.tokens} prompt tokens are waiting already, and at most {bound} may; try again shortly",
            retry_after=self.wait_s(self.tokens + tokens - bound + ahead),
        )

    def wait_s(self, tokens: int) -> float:
        """How long so many take, as measured lately."""
        return max(LEAST_RETRY_S, tokens * (self.pace.seconds_per_token or 0.0))

    def add(self, sequence_id: int, tokens: int) -> None:
        self.remove(sequence_id)
        self._waiting[sequence_id] = tokens
        self.tokens += tokens

    def remove(self, sequence_id: int) -> None:
        self.tokens -= self._waiting.pop(sequence_id, 0)

    def check(self, waiting: Iterable[int]) -> None:
        """Raise EngineError unless exactly these sequences wait and the sum is theirs."""
        if self._waiting.keys() != set(waiting) or self.tokens != sum(self._waiting.values()) or self.tokens < 0:
            raise EngineError(f"{self.tokens} tokens wait by the account of {len(self._waiting)} sequences")
