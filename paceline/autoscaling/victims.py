"""Which target replica leaves first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could go. `node_replicas` are those on its node, `sessions` the ones whose KV it holds if it says
    so, `age` its rank from the oldest, 0, to the newest."""

    replica: str
    running: bool = True
    on_head: bool = False
    node_replicas: int = 1
    sessions: float | None = None
    age: int = 0


def order(candidates: Sequence[Candidate]) -> list[str]:
    """Names, first to go first.

    One that does not run yet holds nothing. The head node stays anyway, so a replica there frees no machine. Each
    session that is held has to be handed over; replicas that hold as many go where the fewest are, so that the node
    is empty soon.
    """
    return [each.replica for each in sorted(candidates, key=_rank)]


def _rank(candidate: Candidate) -> tuple[bool, bool, float, int, int, str]:
    sessions = candidate.sessions
    held = sessions if sessions is not None and isfinite(sessions) else float("inf")
    return (candidate.running, candidate.on_head, held, candidate.node_replicas, -candidate.age, candidate.replica)
