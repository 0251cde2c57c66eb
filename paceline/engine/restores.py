"""Sessions on their way back: begun while a request waits, put into the KV cache as it is admitted.

    waiting ── worth it? ──► fetched in the background ──► admitted: into the KV cache, found there as any prefix
                │ no                │ late, or lost
                └───────────────────┴──────────────────────► admitted: computed

A sequence whose KV is on its way is passed by all others; it waits `timeout_s` at most.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from paceline.engine.kv_cache import KVCache, KVEntry
from paceline.engine.kv_tiers import MIN_TOKENS, KVTiers, Restored, Tier
from paceline.engine.pace import Pace
from paceline.engine.sequence import Sequence
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

DEFAULT_TIMEOUT_S = 10.0
PATIENCE = 2.0
"""A restore is given so many times what computing the tokens takes."""
AT_ONCE = 4
"""Sessions fetched and not yet in the KV cache: their memory is in no account."""
GUESS = 4.0
"""How much faster a token is fetched than computed, as long as that was not measured. A session is fetched whole: not
for less than one of so many of its tokens."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a sequence could use: KV of `ids`, of which the KV cache has the first `stored`."""

    ids: np.ndarray
    window: StreamingWindow | None
    stored: int

    def gained(self, outline: KVEntry) -> int:
        """Tokens that need not be computed if this is fetched."""
        return outline.serves(outline.shared_prefix(self.ids), self.window) - self.stored

    def worth(self, outline: KVEntry, speedup: float) -> bool:
        """Whether that is less work, if a token is fetched `speedup` times as fast as it is computed."""
        gained = self.gained(outline)
        return gained >= MIN_TOKENS and gained * speedup >= outline.held


@dataclass(eq=False, slots=True)
class _Restore:
    """A session on its way, for every sequence that waits for it; `future` is None until it is its turn."""

    session_id: str
    tier: Tier
    tokens: int
    wanted: Callable[[KVEntry], bool]
    began: float
    deadline: float
    future: Future[Restored | None] | None = None
    late: bool = False
    delivered: bool = False

    @property
    def pending(self) -> bool:
        return not self.late and (self.future is None or not self.future.done())

    @property
    def found(self) -> Restored | None:
        if self.future is None or not self.future.done() or self.future.exception() is not None:
            return None
        return self.future.result()

    @property
    def fruitless(self) -> bool:
        return not self.late and not self.pending and self.found is None

    @property
    def under_way(self) -> bool:
        """Whether it takes memory that is in no account."""
        return not self.delivered and self.future is not None and (not self.future.done() or self.found is not None)


class Restores:
    """The engine's side of the tiers. Not locked: the engine's thread alone asks.

    `measured`: what is worth fetching, and how long it is waited for, follows from how fast tokens were computed and
    fetched lately; else every restore has `timeout_s`.
    """

    def __init__(
        self,
        kv: KVCache,
        tiers: KVTiers,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        measured: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.restored: Counter[Tier] = Counter()
        """Sessions put into the KV cache, by the tier they came from."""
        self.restored_tokens = 0
        self.late = 0
        """Sessions that did not come in time; what waited for them was computed."""
        self.tiers = tiers
        self._kv, self._timeout_s, self._clock = kv, timeout_s, clock
        self._measured, self._prefill = measured, Pace()
        self._fetch: dict[Tier, Pace] = {"host": Pace(), "disk": Pace()}
        self._of: dict[int, _Restore | None] = {}
        self._puts_seen: dict[int, int] = {}

    def awaits(self, sequence: Sequence) -> bool:
        """Whether KV for a waiting sequence is on its way. The first time it is asked, the way begins."""
        restore = self._decided(sequence)
        if restore is None or not restore.pending:
            return False
        if restore.future is None and sum(each.under_way for each in self._all()) < AT_ONCE:
            restore.future = self.tiers.fetch(restore.session_id, restore.wanted)
        now = self._clock()
        if restore.pending and now >= restore.deadline:
            restore.late = True
            self.late += 1
            self._fetch[restore.tier].note(restore.tokens, now - restore.began)
        return restore.pending

    def deliver(self, sequence: Sequence) -> None:
        """Put what came for a sequence into the KV cache, right before the sequence takes it."""
        restore = self._of.get(sequence.sequence_id)
        restored = restore.found if restore is not None else None
        if restore is None or restored is None or restore.delivered:
            return
        restore.delivered = True
        self._fetch[restored.tier].note(restored.outline.held, restored.seconds)
        # A request of the same session may have computed as much meanwhile.
        wish = self._wish(sequence)
        if wish.gained(restored.outline) >= MIN_TOKENS and restored.put_into(self._kv):
            sequence.restored = restored.tier, wish.stored
            self.tiers.taken(restored)
            self.restored[restored.tier] += 1
            self.restored_tokens += restored.outline.held

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens."""
        if tokens >= MIN_TOKENS // 2:
            self._prefill.note(tokens, seconds)

    def forget(self, sequence: Sequence) -> None:
        """It waits no more."""
        self._of.pop(sequence.sequence_id, None)
        self._puts_seen.pop(sequence.sequence_id, None)

    def wait(self, timeout_s: float) -> None:
        """Until something came; for nothing if nothing is on its way."""
        fetched = {each.future for each in self._all() if each.future is not None and each.pending}
        if fetched:
            concurrent.futures.wait(fetched, timeout_s, concurrent.futures.FIRST_COMPLETED)

    def status(self) -> dict[str, int | str]:
        """What is kept outside of the KV cache, and what came of it; for /status."""
        found: dict[str, int | str] = {"kv_tier_dtype": "int8" if self.tiers.quantized else "lossless"}
        for tier, usage in self.tiers.usage().items():
            found |= {
                f"kv_{tier}_sessions": usage.sessions,
                f"kv_{tier}_tokens": usage.tokens,
                f"kv_{tier}_bytes": usage.num_bytes,
                f"kv_{tier}_restores": self.restored[tier],
            }
        failed = {"kv_restored_tokens": self.restored_tokens, "kv_restores_late": self.late}
        return found | failed | {"kv_restores_failed": self.tiers.broken, "kv_tier_drops": self.tiers.dropped}

    def check(self, waiting: Iterable[Sequence]) -> None:
        """Raise EngineError unless only waiting sequences are waited for, and the tiers' account closes."""
        if not self._of.keys() <= {sequence.sequence_id for sequence in waiting}:
            raise EngineError("KV is on its way for a sequence that does not wait")
        self.tiers.check()

    def _decided(self, sequence: Sequence) -> _Restore | None:
        """Decided once; again if nothing came and the tiers got something since: its session may have been evicted."""
        number = sequence.sequence_id
        restore, first = self._of.get(number), number not in self._of
        nothing = restore is None or restore.fruitless
        if first or (nothing and self._puts_seen[number] != self.tiers.puts):
            self._puts_seen[number] = self.tiers.puts
            restore = self._of[number] = self._decide(sequence, first)
        return restore

    def _decide(self, sequence: Sequence, first: bool) -> _Restore | None:
        own = sequence.request.session_id
        if sequence.owes_prompt or len(sequence.tokens) <= MIN_TOKENS:
            return None
        if not first and (own is None or self.tiers.tier_of(own) is None):
            return None
        wish = self._wish(sequence)
        best = self.tiers.find(wish.ids, own, wish.window)
        if best is not None and best.session_id is not None:
            tier = self.tiers.tier_of(best.session_id) or "disk"
            if wish.worth(best, self._speedup(tier)):
                return self._way_of(best.session_id, wish, tier)
            if wish.gained(best) >= MIN_TOKENS:
                self._fetch[tier].relax()
        # Another process that shares the folder may have put it there.
        missing = len(wish.ids) - wish.stored
        if first and own is not None and missing >= MIN_TOKENS and self.tiers.may_have_file(own):
            return self._way_of(own, wish, "disk")
        return None

    def _way_of(self, session_id: str, wish: _Wish, tier: Tier) -> _Restore:
        """The one under way, for several sequences want the same."""
        for each in self._all():
            if each.session_id == session_id and not each.delivered:
                return each
        speedup, missing, now = self._speedup(tier), len(wish.ids) - wish.stored, self._clock()
        return _Restore(
            session_id, tier, missing, lambda outline: wish.worth(outline, speedup), now, now + self._patience(missing)
        )

    def _speedup(self, tier: Tier) -> float:
        """How much faster a token is fetched than computed."""
        compute, fetch = self._prefill.seconds_per_token, self._fetch[tier].seconds_per_token
        return compute / fetch if self._measured and compute and fetch else GUESS

    def _patience(self, tokens: int) -> float:
        """Seconds a restore is waited for, in view of how long computing the tokens would take."""
        compute = self._prefill.seconds_per_token
        if not self._measured or compute is None:
            return self._timeout_s
        return min(self._timeout_s, PATIENCE * compute * tokens)

    def _wish(self, sequence: Sequence) -> _Wish:
        ids = np.asarray(sequence.tokens[:-1], dtype=np.int32)
        stored = self._kv.match(sequence.tokens, sequence.request.session_id, sequence.window)
        return _Wish(ids, sequence.window, stored)

    def _all(self) -> set[_Restore]:
        return {each for each in self._of.values() if each is not None}
