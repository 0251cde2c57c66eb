"""How many target replicas each signal asks for: pure functions of the pool's load. None is not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import TargetPool
from paceline.autoscaling.snapshot import Reason

MOST_RATIO = 1.5
"""However late tokens are, so many times as many replicas at once: what is late shows only once they run."""


def seats(pool: TargetPool, goals: Goals) -> float | None:
    """Sequences, and the time that prompts take: while a replica computes one, its sequences wait."""
    parts = [part for part in (decoding(pool), prompting(pool)) if part is not None]
    return sum(parts) / goals.target.utilization if parts else None


def kv(pool: TargetPool, goals: Goals) -> float | None:
    return None if pool.kv_in_use is None else pool.kv_in_use / goals.target.utilization


def prefill(pool: TargetPool, goals: Goals, ahead: float) -> float | None:
    """The queue computed within the objective, or within a start if that is longer: nobody new helps sooner. And
    beside it the prompts that keep coming."""
    if pool.queued_prefill_tokens is None or pool.prefill_tokens_per_s is None:
        return None
    queued = pool.queued_prefill_tokens / pool.prefill_tokens_per_s
    return queued / max(goals.ttft_s, ahead) + (prompting(pool) or 0.0)


def ttft(pool: TargetPool, goals: Goals) -> float | None:
    """Nothing, once nobody waits: the quantile remembers requests that were served since. Nor where a prompt alone
    takes longer than the objective: however many replicas there are, none computes it sooner."""
    waits = (pool.waiting or 0.0) > 0 or (pool.queued_prefill_tokens or 0.0) > 0
    own_s = prompt_s(pool)
    helps = waits and (own_s is None or own_s < goals.ttft_s)
    return _late(pool.ttft_p95_s, goals.ttft_s, pool.reported if helps else 0)


def itl(pool: TargetPool, goals: Goals) -> float | None:
    """Nothing, while replicas are not full: steps are then slow for another reason than their number of sequences."""
    parts = [part for part in (decoding(pool), prompting(pool)) if part is not None]
    full = not parts or sum(parts) >= goals.target.utilization * pool.reported
    return _late(pool.itl_p95_s, goals.itl_s, pool.reported if full else 0)


def forecast(pool: TargetPool, goals: Goals, growth: tuple[float, float]) -> float | None:
    """What the seats and KV ask for, when there are `growth` times as many requests and prompt tokens."""
    requests, prompts = growth
    known = [(decoding(pool), requests), (prompting(pool), prompts)]
    parts = [part * times for part, times in known if part is not None]
    filled = [sum(parts)] if parts else []
    if pool.kv_in_use is not None:
        filled.append(pool.kv_in_use * requests)
    return max(filled) / goals.target.utilization if filled else None


def lasting(pool: TargetPool, goals: Goals, growth: tuple[float, float] = (1.0, 1.0)) -> float | None:
    """What the load would ask for if nobody waited. A queue is gone once replicas are there, and need not be held for
    as long as the load that was there beside it.
    """
    want = forecast(replace(pool, waiting=0.0), goals, growth)
    return None if want is None else filled_up(want, pool)


def wanted(
    pool: TargetPool, goals: Goals, ahead: float, growth: tuple[float, float] = (1.0, 1.0)
) -> dict[Reason, float]:
    """What each signal that is known asks for, for the whole pool."""
    asked = {
        Reason.SEATS: seats(pool, goals),
        Reason.KV: kv(pool, goals),
        Reason.PREFILL: prefill(pool, goals, ahead),
        Reason.TTFT: ttft(pool, goals),
        Reason.ITL: itl(pool, goals),
        Reason.FORECAST: forecast(pool, goals, growth),
    }
    return {reason: filled_up(want, pool) for reason, want in asked.items() if want is not None}


def filled_up(want: float, pool: TargetPool) -> float:
    """`want` comes from those that reported. The others, which start or are silent, do nothing where that would bring
    more replicas, and as much as those that reported where it would take some: so neither is done by mistake."""
    if not 0 < pool.reported < pool.replicas:
        return want
    return max(want, min(float(pool.replicas), want * pool.replicas / pool.reported))


def decoding(pool: TargetPool) -> float | None:
    """Replicas whose seats are taken, with those waiting for one."""
    if pool.running is None or pool.seats is None:
        return None
    return (pool.running + (pool.waiting or 0.0)) / pool.seats


def prompting(pool: TargetPool) -> float | None:
    """Replicas that only compute the prompts that come."""
    if pool.prompt_tokens_per_s is None or pool.prefill_tokens_per_s is None:
        return None
    return pool.prompt_tokens_per_s / pool.prefill_tokens_per_s


def prompt_s(pool: TargetPool) -> float | None:
    """What an average prompt takes to be computed."""
    busy = prompting(pool)
    return busy / pool.requests_per_s if busy is not None and pool.requests_per_s else None


def strongest(asked: Mapping[Reason, float]) -> tuple[Reason, float] | None:
    """The signal that asks for most; of several the plainer one, which stands before."""
    return max(asked.items(), key=lambda each: each[1], default=None)


def _late(measured: float | None, objective: float, replicas: int) -> float | None:
    if measured is None:
        return None
    return replicas * min(measured / objective, MOST_RATIO) if measured > objective else 0.0


def told(reason: Reason, pool: TargetPool, goals: Goals, ahead: float) -> str:
    """The numbers behind a signal, for people."""
    many = f"on {pool.reported} replica{'' if pool.reported == 1 else 's'}"
    aim = f"{goals.target.utilization:.2g} wanted"
    match reason:
        case Reason.SEATS:
            return f"{_seats_told(pool)} {many}, {aim}"
        case Reason.KV:
            return f"{pool.kv_in_use or 0:.3g} of {pool.reported} KV caches in use {many}, {aim}"
        case Reason.PREFILL:
            within = max(goals.ttft_s, ahead)
            return f"{pool.queued_prefill_tokens or 0:.0f} prompt tokens wait {many}, to be computed in {within:.3g} s"
        case Reason.TTFT:
            return f"time to first token {pool.ttft_p95_s or 0:.3g} s {many}, {goals.ttft_s:.3g} s wanted"
        case Reason.ITL:
            return f"time between tokens {pool.itl_p95_s or 0:.3g} s {many}, {goals.itl_s:.3g} s wanted"
        case _:
            return f"load grows for the {ahead:.0f} s that a start takes: {_seats_told(pool)} {many} now, {aim}"


def _seats_told(pool: TargetPool) -> str:
    prompts = f"{busy:.2g} replicas busy with prompts" if (busy := prompting(pool)) else ""
    if pool.running is None or pool.seats is None:
        return prompts or f"{pool.kv_in_use or 0:.3g} KV caches in use"
    parts = [f"{pool.running:.3g} of {pool.seats * max(1, pool.reported):.3g} seats in use"]
    if pool.waiting:
        parts.append(f"{pool.waiting:.3g} sequences waiting")
    return ", ".join([*parts, prompts] if prompts else parts)
