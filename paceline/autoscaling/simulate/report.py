"""What came of a simulation, in numbers; and how far one policy is ahead of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from paceline.autoscaling.simulate.histogram import mean, quantile
from paceline.autoscaling.simulate.record import Record


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy over one trace."""

    trace: str
    policy: str
    requests: float
    completed: float
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p95_s: float | None
    goodput: float
    """Share of the requests that were served within both objectives."""
    output_tokens: float
    target_hours: float
    draft_hours: float
    cost: float
    """In hours of a target."""
    most_replicas: float
    mean_replicas: float
    changes: int
    wall_s: float = 0.0


def outcome(trace: str, policy: str, record: Record, price: float, wall_s: float = 0.0) -> Outcome:
    ttft, itl = record.ttft.sum(axis=0), record.itl.sum(axis=0)
    requests = float(record["requests"].sum())
    targets, drafts = float(record["replica_s"].sum()) / 3600, float(record["draft_s"].sum()) / 3600
    seconds = record["seconds"]
    lived = record.over_time("running")[seconds > 0]
    return Outcome(
        trace=trace,
        policy=policy,
        requests=requests,
        completed=float(record["completed"].sum()),
        ttft_mean_s=mean(ttft),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p95_s=quantile(ttft, 0.95),
        ttft_p99_s=quantile(ttft, 0.99),
        itl_p50_s=quantile(itl, 0.5),
        itl_p95_s=quantile(itl, 0.95),
        goodput=float(record["good"].sum()) / requests if requests else 1.0,
        output_tokens=float(record["tokens"].sum()),
        target_hours=targets,
        draft_hours=drafts,
        cost=targets + price * drafts,
        most_replicas=float(lived.max(initial=0.0)),
        mean_replicas=float(record["running"].sum() / max(seconds.sum(), 1e-9)),
        changes=sum(entry[1] == "target" for entry in record.decisions),
        wall_s=wall_s,
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """One policy against a frontier of others."""

    cost_at_same_p95: float | None
    """What the frontier costs at this policy's p95; None if none of it is as fast."""
    p95_at_same_cost: float | None
    saved: float | None
    """Share of that cost."""


def against(frontier: Sequence[Outcome], ours: Outcome) -> Comparison:
    """The frontier is of those points that no other beats in both, with straight lines of logarithms between them. One
    that is faster throughout is read at its cheapest point.
    """
    points = [(each.ttft_p95_s, each.cost) for each in frontier if each.ttft_p95_s is not None]
    edge = unbeaten([(log(p95), log(cost)) for p95, cost in points])
    if not edge or ours.ttft_p95_s is None:
        return Comparison(None, None, None)
    cost = _read(edge, log(ours.ttft_p95_s))
    p95 = _read(sorted((c, p) for p, c in edge), log(ours.cost))
    return Comparison(
        None if cost is None else exp(cost),
        None if p95 is None else exp(p95),
        None if cost is None else 1 - ours.cost / exp(cost),
    )


def unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of which no other is lower in both, by x."""
    edge: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not edge or y < edge[-1][1]:
            edge.append((x, y))
    return edge


def _read(edge: Sequence[tuple[float, float]], x: float) -> float | None:
    """On the line; its last value beyond its end, None before its beginning."""
    if x < edge[0][0]:
        return None
    return float(np.interp(x, [point[0] for point in edge], [point[1] for point in edge]))
