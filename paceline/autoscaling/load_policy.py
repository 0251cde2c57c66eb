"""The policy that follows the load: signals, the strongest of them, damping, and a sentence about it."""

from __future__ import annotations

from collections.abc import Mapping

from paceline.autoscaling import drafts, targets
from paceline.autoscaling.damping import Damping, Settled, Stopwatch, bounded
from paceline.autoscaling.forecast import Forecast
from paceline.autoscaling.goals import Goals, PoolGoals
from paceline.autoscaling.loads import DraftPool, TargetPool, draft_pool, target_pool
from paceline.autoscaling.policy import Policy
from paceline.autoscaling.snapshot import Decision, Decisions, Pool, Reason, Snapshot
from paceline.autoscaling.worth import Worth
from paceline.config_autoscaling import AutoscalingSettings

Asked = Mapping[Reason, float]


class LoadPolicy(Policy):
    """What the `autoscaling` settings describe. `cpu` says that targets run on one, for what is "auto" still."""

    def __init__(self, settings: AutoscalingSettings, *, cpu: bool = False) -> None:
        goals = Goals.of(settings, cpu=cpu)
        self._watch = Stopwatch(goals.interval_s)
        self._targets, self._drafts = _Targets(goals), _Drafts(goals)

    def decide(self, seen: Snapshot) -> Decisions:
        return self.weigh(seen.now, target_pool(seen), draft_pool(seen) if seen.has_drafts else None)

    def weigh(self, now: float, target: TargetPool, draft: DraftPool | None) -> Decisions:
        """As `decide`, of pools that are summed up already. `draft` is None where there is no pool of drafters."""
        passed = self._watch.passed(now)
        sized, target_asked = self._targets.size(passed, target)
        drafted, draft_asked = self._drafts.size(passed, draft)
        signals = {(Pool.TARGET, reason): want for reason, want in target_asked.items()}
        signals |= {(Pool.DRAFT, reason): want for reason, want in draft_asked.items()}
        return Decisions(sized, drafted, signals)


class _Targets:
    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._forecast = Forecast(goals)
        self._damping = Damping(goals.target)

    def size(self, passed: float, pool: TargetPool) -> tuple[Decision, Asked]:
        goals, before = self._goals, pool.replicas
        growth = self._forecast.note(passed, pool) if pool.reported else (1.0, 1.0)
        ahead = self._forecast.ahead
        asked = targets.wanted(pool, goals, ahead, growth) if pool.reported else {}
        strongest = targets.strongest(asked)
        if strongest is None:
            return _unknown(Pool.TARGET, before, goals.target, pool.reported), {}
        signal, want = strongest
        settled = self._damping.settle(passed, before, want)
        reason = _reason(settled, before, signal, goals.target)
        text = targets.told(signal, pool, goals, ahead) + _ending(settled, before, want, goals.target)
        return Decision(Pool.TARGET, before, settled.replicas, reason, text), asked


class _Drafts:
    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._worth = Worth(goals)
        self._damping = Damping(goals.draft)

    def size(self, passed: float, pool: DraftPool | None) -> tuple[Decision, Asked]:
        if pool is None:
            return Decision(Pool.DRAFT, 0, 0, Reason.STEADY, "there is no pool of drafters"), {}
        goals, worth, before = self._goals, self._worth, pool.replicas
        fewer = worth.look(passed, pool)
        asked = drafts.wanted(pool, goals, worth)
        strongest = targets.strongest(asked)
        if strongest is None:
            return _unknown(Pool.DRAFT, before, goals.draft, pool.reported), {}
        signal, want = strongest
        most = drafts.most(pool, worth)
        settled = self._damping.settle(passed, before, min(want, most))
        if fewer is not None and fewer < settled.replicas:
            text = drafts.told(Reason.GAIN, pool, goals, worth) + f": {fewer}"
            return Decision(Pool.DRAFT, before, fewer, Reason.GAIN, text), asked
        if settled.replicas > before:
            worth.grew(pool, settled.replicas, late=signal is Reason.LATE)
        held = settled.replicas == before and want > most
        reason = Reason.GAIN if held else _reason(settled, before, signal, goals.draft)
        shown = reason if held or settled.replicas > before else Reason.DEMAND
        text = drafts.told(shown, pool, goals, worth) + _ending(settled, before, min(want, most), goals.draft)
        return Decision(Pool.DRAFT, before, settled.replicas, reason, text), asked


def _reason(settled: Settled, before: int, signal: Reason, goals: PoolGoals) -> Reason:
    if settled.replicas == before:
        return Reason.BOUNDS if settled.bounded else Reason.STEADY
    if settled.bounded and settled.replicas == bounded(before, goals):
        return Reason.BOUNDS
    return signal if settled.replicas > before else Reason.IDLE


def _ending(settled: Settled, before: int, want: float, goals: PoolGoals) -> str:
    """Of the sentence about a pool: what follows from the numbers before it."""
    count = settled.replicas
    if count > before:
        return f": {count}" + (f", the most, and {want:.3g} needed" if settled.bounded else "")
    if count < before:
        return f": at most {settled.most:.2g} needed for {goals.downscale_delay_s:.0f} s: {count}"
    if settled.bounded:
        return f": {want:.3g} needed, and {before} {'are the most' if want > before else 'the fewest'}"
    return f": {want:.3g} of {before} needed"


def _unknown(pool: Pool, before: int, goals: PoolGoals, reported: int) -> Decision:
    replicas = bounded(before, goals)
    if replicas != before:
        text = f"from {goals.min_replicas} to {goals.max_replicas} may be: {replicas}"
        return Decision(pool, before, replicas, Reason.BOUNDS, text)
    said = "no replica has reported" if not reported else f"{reported} replicas reported nothing of their load"
    return Decision(pool, before, before, Reason.UNKNOWN, f"{said}: {before} stay")
