"""What the autoscaler wants and decided: read from its journal, which every router has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paceline.api.metrics.family import Family, Sample, mapping_at, number_at
from paceline.api.state import ClusterStatus
from paceline.autoscaling.snapshot import Pool, Reason

DIRECTIONS = ("up", "down")


def _of_pools(key: str, cluster: ClusterStatus) -> Iterator[Sample]:
    for pool in Pool:
        if (value := number_at(cluster.autoscaling, pool.value, key)) is not None:
            yield (pool.value,), value


def _wanted(cluster: ClusterStatus) -> Iterator[Sample]:
    yield from _of_pools("wanted", cluster)


def _decisions(cluster: ClusterStatus) -> Iterator[Sample]:
    """All that there may be, from 0: a rate over a series that begins with its first event misses that one."""
    counts = mapping_at(cluster.autoscaling, "counts")
    for pool in Pool:
        for reason in Reason:
            for direction in DIRECTIONS:
                count = number_at(counts, f"{pool.value}/{direction}/{reason.value}")
                yield (pool.value, reason.value, direction), count or 0


def _signals(cluster: ClusterStatus) -> Iterator[Sample]:
    for pool in Pool:
        signals: Mapping[str, Any] = mapping_at(cluster.autoscaling, pool.value, "signals")
        for signal in signals:
            if (value := number_at(signals, signal)) is not None:
                yield (pool.value, signal), value


def _errors(cluster: ClusterStatus) -> Iterator[Sample]:
    yield (), number_at(cluster.autoscaling, "errors") or 0


FAMILIES = (
    Family(
        "paceline_autoscaling_replicas_wanted",
        "gauge",
        "Replicas that a pool should have: by the autoscaler, or by the settings if there is none.",
        _wanted,
        ("pool",),
        "cluster",
    ),
    Family(
        "paceline_autoscaling_decisions_total",
        "counter",
        "Changes of a pool's size, by why and which way.",
        _decisions,
        ("pool", "reason", "direction"),
        "cluster",
    ),
    Family(
        "paceline_autoscaling_signal",
        "gauge",
        "Replicas that each signal asks for, whole or not; the strongest counts.",
        _signals,
        ("pool", "signal"),
        "cluster",
    ),
    Family(
        "paceline_autoscaling_errors_total",
        "counter",
        "Looks at which the policy failed, and every pool stayed as it was.",
        _errors,
        scope="cluster",
    ),
    Family(
        "paceline_autoscaling_waiting",
        "gauge",
        "Pools that have waited long for a replica which cannot be started; /status says why.",
        lambda cluster: [((), len(cluster.autoscaling.get("waiting") or ()))],
        scope="cluster",
    ),
)
