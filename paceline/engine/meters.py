"""What the policy of autoscaling sees of a replica, measured by the thread that owns the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from paceline.autoscaling.snapshot import DraftLoad, TargetLoad
from paceline.engine.recent import Recent, RecentQuantiles, SteadyClock
from paceline.engine.sequence import Sequence

if TYPE_CHECKING:
    from paceline.engine.drafter import Drafter
    from paceline.engine.engine import Engine


class EngineMeter:
    """Of an engine: it tells what happens, and `load` says what the last seconds were like."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        steady = SteadyClock(clock)
        self._recent = Recent(steady)
        self._ttft, self._gap = RecentQuantiles(steady), RecentQuantiles(steady)
        self.look()

    def arrived(self, prompt_tokens: int) -> None:
        """A request with so many prompt tokens to compute."""
        self._recent.add("requests", 1.0)
        self._recent.add("prompt_tokens", prompt_tokens)
        self.look()

    def emitted(self, sequence: Sequence, tokens: int, now: float) -> None:
        """A delta; `sequence.last_token` is still that of the one before it."""
        self._recent.add("output_tokens", tokens)
        if sequence.last_token:
            self._gap.note(now - sequence.last_token)
        else:
            self._ttft.note(sequence.first_token - sequence.arrived)

    def stepped(self, seconds: float) -> None:
        """A step is over."""
        self._recent.add("busy", seconds)
        speculator = self._engine.speculator
        if speculator is not None:
            demand, saved = speculator.demand, speculator.draft_saved_s or 0.0
            self._recent.counted(tokens=demand.tokens, steps=demand.steps, without=demand.without, saved=saved)
        self.look()

    def look(self) -> None:
        """What runs and waits changed."""
        engine = self._engine
        usage, speculator = engine.kv.usage(), engine.speculator
        wanting = 0 if speculator is None else speculator.drafts_wanted or 0
        self._recent.levels(
            running=engine.num_running, waiting=engine.num_waiting, kv=usage.in_use / usage.total, wanting=wanting
        )

    def load(self, replica: str) -> TargetLoad:
        """What the engine knows of it. Rates and means are of ten seconds, quantiles of thirty."""
        engine, recent = self._engine, self._recent
        pace = engine.prefill_seconds_per_token
        speculator = engine.speculator
        drafts = speculator is not None and speculator.drafts_wanted is not None
        judged = speculator is not None and speculator.draft_saved_s is not None
        wanting, late = recent.sum("steps"), recent.sum("without")
        return TargetLoad(
            replica,
            running=recent.mean("running"),
            waiting=recent.mean("waiting"),
            queued_prefill_tokens=engine.queued_prefill_tokens + engine.missing_tokens,
            prefill_tokens_per_s=1 / pace if pace else None,
            prompt_tokens_per_s=recent.rate("prompt_tokens"),
            output_tokens_per_s=recent.rate("output_tokens"),
            requests_per_s=recent.rate("requests"),
            kv_in_use=recent.mean("kv"),
            ttft_p95_s=self._ttft.at(0.95),
            itl_p95_s=self._gap.at(0.95),
            drafts_wanted=recent.mean("wanting") if drafts else None,
            draft_tokens_wanted_per_s=recent.rate("tokens") if drafts else None,
            draft_late=late / wanting if drafts and wanting else None,
            draft_saved=recent.rate("saved") if judged else None,
            busy=min(1.0, recent.rate("busy")),
        )

    def seats(self, itl_s: float) -> int:
        """Sequences that decode together with so many seconds from token to token, as steps were measured; as many as
        may run where they were not."""
        speculator, most = self._engine.speculator, self._engine.limits.max_num_seqs
        cost = None if speculator is None else speculator.cost
        return most if cost is None else cost.windows_within(itl_s, most)


class DrafterMeter:
    """Of a drafter, whose steps it counts."""

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.monotonic) -> None:
        self.busy_s = 0.0
        """Seconds in steps since the start."""
        self._drafter, self._clock = drafter, clock
        self._recent = Recent(SteadyClock(clock))

    def time(self, step: Callable[[], None]) -> None:
        began = self._clock()
        step()
        self.busy_s += max(0.0, self._clock() - began)
        self._count()

    def load(self, replica: str) -> DraftLoad:
        """Its last ten seconds."""
        self._count()
        return DraftLoad(
            replica,
            busy=min(1.0, self._recent.rate("busy")),
            tokens_per_s=self._recent.rate("tokens"),
            sequences=self._recent.mean("sequences"),
        )

    def _count(self) -> None:
        self._recent.counted(busy=self.busy_s, tokens=self._drafter.drafted_tokens)
        self._recent.levels(sequences=self._drafter.num_sequences)
