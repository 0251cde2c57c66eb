"""What a replica reports to the policy of autoscaling, and how long it took to be there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from paceline.autoscaling.snapshot import DraftLoad, TargetLoad
from paceline.engine.status import session_states

if TYPE_CHECKING:
    # torch and transformers take seconds to import; the application builder imports this module without them.
    from paceline.engine.engine import Engine
    from paceline.engine.meters import DrafterMeter

LONGEST_IMPORT_S = 30.0
"""Ray keeps idle processes at hand: one that is older than this when its replica begins was such a one."""


def own_age_s() -> float:
    """Seconds since this process was made."""
    return time.time() - psutil.Process().create_time()


class Starting:
    """Measures from the process's beginning, as far as that was for the replica, until `done`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, age_s: Callable[[], float] = own_age_s) -> None:
        before = age_s()
        self._clock = clock
        self._began = clock() - (before if 0 <= before <= LONGEST_IMPORT_S else 0.0)

    def done(self) -> float:
        """Seconds so far."""
        return self._clock() - self._began


@dataclass(frozen=True, slots=True)
class TargetReport:
    """`itl_s` is the objective for the time between tokens, by which the seats are counted."""

    replica_id: str
    engine: Engine
    itl_s: float
    start_s: float

    def load(self) -> TargetLoad:
        sessions = session_states(self.engine)
        return replace(
            self.engine.meter.load(self.replica_id),
            seats=self.engine.meter.seats(self.itl_s),
            sessions=sum(count for state, count in sessions.items() if state != "disk"),
            start_s=self.start_s,
        )

    def status(self) -> dict[str, Any]:
        """For /status and /metrics: the load, and counters since the start; None is not known."""
        speculator = self.engine.speculator
        return {
            "load": self.load().numbers(),
            "draft_saved_s": None if speculator is None else speculator.draft_saved_s,
            "draft_tokens_wanted": 0 if speculator is None else speculator.demand.tokens,
        }


@dataclass(frozen=True, slots=True)
class DraftReport:
    """The same of a draft replica."""

    replica_id: str
    meter: DrafterMeter
    start_s: float

    def load(self) -> DraftLoad:
        return replace(self.meter.load(self.replica_id), start_s=self.start_s)

    def status(self) -> dict[str, Any]:
        """For /status and /metrics."""
        return {"load": self.load().numbers(), "busy_s": self.meter.busy_s}
