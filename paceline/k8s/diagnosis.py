"""Why a release is not ready: a verdict, its causes in order, the events behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ClusterError
from paceline.k8s.api import Api
from paceline.k8s.snapshot import Snapshot, age_s, event_time
from paceline.k8s.troubles import Trouble, troubles
from paceline.k8s.waiting import waits_for

LOG_LINES = 8
EVENTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class EventGroup:
    """Events that say the same of one object, taken together."""

    about: str
    reason: str
    message: str
    times: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`logs` are the last lines of what a trouble names, by the trouble's place."""

    healthy: bool
    verdict: str
    causes: Sequence[Trouble] = ()
    logs: Mapping[int, Sequence[str]] = field(default_factory=dict)
    events: Sequence[EventGroup] = ()
    conditions: Sequence[Mapping[str, Any]] = ()
    nodes_read: bool = True


def diagnose(seen: Snapshot, logs: Mapping[int, Sequence[str]] | None = None) -> Diagnosis:
    """Judge a snapshot. Pure."""
    causes = troubles(seen)
    return Diagnosis(
        healthy=seen.ready and not causes,
        verdict=_verdict(seen, causes),
        causes=causes,
        logs=logs or {},
        events=grouped(seen, warnings_only=True),
        conditions=(seen.status.get("conditions") or ()),
        nodes_read=seen.nodes is not None,
    )


def read_logs(api: Api, causes: Sequence[Trouble], lines: int = LOG_LINES) -> dict[int, list[str]]:
    """The end of the log of each trouble that has one; what cannot be read is said in its place."""
    found = {}
    for place, cause in enumerate(causes):
        if cause.pod and cause.log:
            try:
                text = api.logs(cause.pod, cause.log, lines=lines, previous=cause.previous)
                found[place] = text.splitlines()[-lines:]
            except ClusterError as error:
                found[place] = [f"({error.message})"]
    return found


def _verdict(seen: Snapshot, causes: Sequence[Trouble]) -> str:
    serving = seen.condition("Ready").get("status") == "True"
    if not causes:
        return f"{seen.name} is ready" if seen.ready else f"{seen.name} is coming up: it waits for {waits_for(seen)}"
    state = "serves, and has troubles" if serving else "is not ready"
    return f"{seen.name} {state}: {causes[0].what}"


def grouped(seen: Snapshot, *, warnings_only: bool = False) -> list[EventGroup]:
    """Events, newest first, those that differ in time alone as one."""
    together: dict[tuple[str, str, str], tuple[int, float]] = {}
    for event in seen.events:
        if warnings_only and event.get("type") != "Warning":
            continue
        about = event["involvedObject"]
        key = (
            f"{about.get('kind')} {about.get('name')}",
            str(event.get("reason")),
            " ".join(str(event.get("message")).split()),
        )
        times, age = together.get(key, (0, float("inf")))
        series = event.get("series") or {}
        count = int(event.get("count") or series.get("count") or 1)
        together[key] = (times + count, min(age, age_s(event_time(event), seen.now)))
    found = [EventGroup(*key, times, age) for key, (times, age) in together.items()]
    return sorted(found, key=lambda group: group.age_s)[:EVENTS_SHOWN]
