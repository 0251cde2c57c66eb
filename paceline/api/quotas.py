"""What one key may use in a minute and at once, counted in the process that answers: every router counts for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from paceline.errors import Overloaded

Clock = Callable[[], float]

BUSY_RETRY_S = 1.0
"""When one of a key's requests will end, nobody knows."""


class Bucket:
    """A token bucket: `per_minute` at most, refilled evenly. It may go below zero, where it is paid back with time."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Take it, whether it is there or not."""
        self._level = self.level - amount

    def wait_s(self, amount: float) -> float:
        """Seconds until there is so much; 0 if there is."""
        return max(0.0, (amount - self.level) * 60 / self.per_minute)

    @property
    def reset_s(self) -> float:
        """Seconds until it is full."""
        return self.wait_s(self.per_minute)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one key. None is none."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


class Quota:
    """How much of its bounds a key has used.

    Tokens are charged as they are computed, and how many an answer will have is known at its end: so a request is let
    in while the account is not below zero, and the debt it leaves is waited for by the next.
    """

    def __init__(self, bounds: Bounds, clock: Clock = time.monotonic) -> None:
        self.open = 0
        self._max_concurrent = bounds.max_concurrent
        self._requests, self._tokens = (
            None if bound is None else Bucket(bound, clock)
            for bound in (bounds.requests_per_minute, bounds.tokens_per_minute)
        )

    @contextmanager
    def request(self, *, counts: bool = True) -> Iterator[None]:
        """One request, while it lasts. Raises Overloaded with the seconds to wait. One that does not count takes
        nothing of the requests of a minute."""
        if self._max_concurrent is not None and self.open >= self._max_concurrent:
            raise Overloaded(
                f"this key has {self.open} requests under way, and may have {self._max_concurrent}",
                retry_after=BUSY_RETRY_S,
            )
        if counts and self._requests is not None:
            if wait_s := self._requests.wait_s(1):
                raise Overloaded(
                    f"this key may send {self._requests.per_minute} requests a minute; try again in {wait_s:.1f} s",
                    retry_after=wait_s,
                )
            self._requests.take(1)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def check_tokens(self) -> None:
        """Raise Overloaded, with the seconds to wait, while the tokens of this minute are used up."""
        if self._tokens is not None and self._tokens.level <= 0:
            wait_s = self._tokens.wait_s(1)
            raise Overloaded(
                f"this key may use {self._tokens.per_minute} tokens a minute; try again in {wait_s:.1f} s",
                retry_after=wait_s,
            )

    def charge(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> Mapping[str, str]:
        """What is left, by OpenAI's names; nothing of what is not bounded."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.reset_s:.3f}s"
        return found
