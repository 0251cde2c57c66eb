"""What the policy of autoscaling sees of a replica, measured by the thread that owns the device.

Any thread may ask for it, and need not wait until a step is over: that may take longer than who asks has patience.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
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
        self._engine, self._lock = engine, threading.Lock()
        if engine.speculator is not None and engine.speculator.cost is not None:
            engine.speculator.cost.curve(engine.limits.max_num_seqs)  # known from now on, whoever asks
        steady = SteadyClock(clock)
        self._recent = Recent(steady)
        self._ttft, self._gap = RecentQuantiles(steady), RecentQuantiles(steady)
        self._tokens, self._gaps, self._waits = 0, Counter[float](), list[float]()
        """Of the step under way; most of its gaps are the same."""
        self.look()

    def arrived(self, prompt_tokens: int) -> None:
        """A request with so many prompt tokens to compute."""
        with self._lock:
            self._recent.add(requests=1, prompt_tokens=prompt_tokens)
        self.look()

    def emitted(self, sequence: Sequence, tokens: int, now: float) -> None:
        """A delta; `sequence.last_token` is still that of the one before it."""
        self._tokens += tokens
        if sequence.last_token:
            self._gaps[now - sequence.last_token] += 1
        else:
            self._waits.append(sequence.first_token - sequence.arrived)

    def stepped(self, seconds: float) -> None:
        """A step is over."""
        speculator = self._engine.speculator
        with self._lock:
            self._recent.add(busy=seconds, output_tokens=self._tokens)
            for gap, times in self._gaps.items():
                self._gap.note(gap, times)
            for wait in self._waits:
                self._ttft.note(wait)
            if speculator is not None:
                demand, saved = speculator.demand, speculator.draft_saved_s or 0.0
                self._recent.counted(tokens=demand.tokens, steps=demand.steps, without=demand.without, saved=saved)
        self._tokens = 0
        self._gaps.clear()
        self._waits.clear()
        self.look()

    def look(self) -> None:
        """What runs and waits changed."""
        engine = self._engine
        usage, speculator = engine.kv.usage(), engine.speculator
        wanting = 0 if speculator is None else speculator.drafts_wanted or 0
        running, waiting = engine.num_running, engine.num_waiting
        with self._lock:
            self._recent.levels(running=running, waiting=waiting, kv=usage.in_use / usage.total, wanting=wanting)

    def load(self, replica: str) -> TargetLoad:
        """What the engine knows of it. Rates and means are of ten seconds, quantiles of thirty."""
        engine, recent = self._engine, self._recent
        pace = engine.prefill_seconds_per_token
        with self._lock:
            seen = TargetLoad(
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
                busy=min(1.0, recent.rate("busy")),
            )
            return self._with_drafts(seen)

    def _with_drafts(self, seen: TargetLoad) -> TargetLoad:
        speculator, recent = self._engine.speculator, self._recent
        if speculator is None or speculator.drafts_wanted is None:
            return seen
        steps = recent.sum("steps")
        return replace(
            seen,
            drafts_wanted=recent.mean("wanting"),
            draft_tokens_wanted_per_s=recent.rate("tokens"),
            draft_late=recent.sum("without") / steps if steps else None,
            draft_saved=None if speculator.draft_saved_s is None else recent.rate("saved"),
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
        self._drafter, self._clock, self._lock = drafter, clock, threading.Lock()
        self._recent = Recent(SteadyClock(clock))

    def time(self, step: Callable[[], None]) -> None:
        began = self._clock()
        step()
        self.busy_s += max(0.0, self._clock() - began)
        self._count()

    def load(self, replica: str) -> DraftLoad:
        """Its last ten seconds."""
        self._count()
        with self._lock:
            return DraftLoad(
                replica,
                busy=min(1.0, self._recent.rate("busy")),
                tokens_per_s=self._recent.rate("tokens"),
                sequences=self._recent.mean("sequences"),
            )

    def _count(self) -> None:
        with self._lock:
            self._recent.counted(busy=self.busy_s, tokens=self._drafter.drafted_tokens)
            self._recent.levels(sequences=self._drafter.num_sequences)
