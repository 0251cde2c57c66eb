"""The policy: a snapshot in, how many replicas of each pool out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from paceline.autoscaling.snapshot import Decisions, Snapshot


class Policy(ABC):
    """Keeps what it has seen between two looks; has no clock but the snapshots'."""

    @abstractmethod
    def decide(self, seen: Snapshot) -> Decisions:
        """How many replicas of each pool there should be. Never raises for anything a snapshot may lack."""
