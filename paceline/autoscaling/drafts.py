"""How many drafters are asked for, and how many may be tried."""

from __future__ import annotations

from math import inf

from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import DraftPool
from paceline.autoscaling.snapshot import Reason
from paceline.autoscaling.worth import Worth


def demand(pool: DraftPool, goals: Goals) -> float | None:
    """Drafters that compute as much as these do, at the utilization wanted; one, while any sequence wants drafts."""
    if pool.wanted == 0:
        return 0.0
    if pool.replicas == 0:
        return None
    if pool.busy is None:
        return None if pool.wanted is None else 1.0
    busy = pool.busy / goals.draft.utilization
    if 0 < pool.reported < pool.replicas:  # those that start: see targets.filled_up
        busy = max(busy, min(float(pool.replicas), busy * pool.replicas / pool.reported))
    return max(1.0, busy)


def late(pool: DraftPool, goals: Goals) -> float | None:
    """One more, if all that are wanted run and still too many steps go without."""
    if pool.late is None or not pool.wanted or not 0 < pool.replicas <= pool.reported:
        return None
    return pool.replicas + 1.0 if pool.late > goals.max_late else 0.0


def wanted(pool: DraftPool, goals: Goals, worth: Worth) -> dict[Reason, float]:
    """What each signal that is known asks for, for the whole pool."""
    asked: dict[Reason, float | None] = {Reason.DEMAND: demand(pool, goals)}
    if pool.replicas == 0 and pool.wanted:
        asked[Reason.RETRY] = 1.0
    judged = worth.pays and worth.mean is not None  # the last one that came, too
    one_more = late(pool, goals) if judged else None
    if one_more is not None or worth.kept(pool):
        asked[Reason.LATE] = max(one_more or 0.0, float(worth.kept(pool)))
    return {reason: want for reason, want in asked.items() if want is not None}


def most(pool: DraftPool, worth: Worth) -> float:
    """Drafters there may be: more only if those there are pay, or if nobody can say whether they do."""
    limit = inf if worth.retry.limit is None else float(max(worth.retry.limit, pool.replicas))
    if pool.replicas and not worth.pays and pool.saved is not None:
        return min(limit, float(pool.replicas))
    return limit


def told(reason: Reason, pool: DraftPool, goals: Goals, worth: Worth) -> str:
    """The numbers behind a decision, for people."""
    sequences = f"{pool.wanted or 0:.3g} sequences want drafts"
    match reason:
        case Reason.RETRY if worth.retry.tries:
            return f"{sequences}, try {worth.retry.tries + 1} of a drafter"
        case Reason.RETRY:
            return f"{sequences}, and there is no drafter"
        case Reason.LATE:
            return f"{pool.late or 0:.0%} of the steps went without drafts, {goals.max_late:.0%} may"
        case Reason.GAIN if pool.replicas == 0:
            return f"{sequences}; drafters did not pay, the next try is in {worth.retry.seconds:.0f} s"
        case Reason.GAIN:
            mean = worth.mean if worth.mean is not None else pool.gain or 0.0
            return f"a second of a drafter saves {mean:.3g} s of targets, {goals.min_gain:.3g} s would pay"
        case _ if not pool.replicas:
            return sequences
        case _:
            busy = f"{pool.reported} drafters busy for {pool.busy or 0:.2g} s a second in all"
            return f"{sequences}, {busy}, {goals.draft.utilization:.2g} each wanted"
