"""Policies to compare with ours."""

from __future__ import annotations

from paceline.autoscaling.policy import Policy
from paceline.autoscaling.snapshot import Decision, Decisions, Pool, Reason, Snapshot


class Fixed(Policy):
    """Always as many targets; the drafters stay as they are."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, seen: Snapshot) -> Decisions:
        text = f"always {self._replicas}"
        return Decisions(
            Decision(Pool.TARGET, seen.num_targets, self._replicas, Reason.BOUNDS, text),
            Decision(Pool.DRAFT, seen.num_drafts, seen.num_drafts, Reason.BOUNDS, "as they are"),
        )
