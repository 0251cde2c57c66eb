"""Speculation that is configured and does nothing: noticed, said why, logged when it begins and not again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from paceline.speculation.telemetry import SpeculationTally

logger = logging.getLogger(__name__)

ENOUGH_STEPS = 64
"""Decode steps, one for each sequence in a forward pass, without a candidate before speculation counts as idle."""
REPEAT_S = 600.0
"""The same thing is not logged more often than this, however often it comes and goes."""
GRACE_S = 20.0
"""Drafters load after the targets do: for so long their absence is shown and not logged."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a target knows of its speculation at one moment.

    `drafts_wanted`: draft replicas are deployed, or meant to be. `rests`: the depth controller has given up on every
    source for now. `problems` says of drafters that do not connect why.
    """

    tally: SpeculationTally
    enabled: bool = True
    lookup: bool = False
    drafts_wanted: bool = False
    drafters_connected: int = 0
    problems: str = ""
    rests: bool = False
    synthetic_acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class _Mark:
    """Counters at the last moment at which there was no reason to complain."""

    drafted: int = 0
    steps: int = 0
    requests: int = 0
    declined: int = 0
    late: int = 0

    @classmethod
    def of(cls, tally: SpeculationTally) -> _Mark:
        return cls(tally.drafted, tally.steps, tally.requests, tally.declined, tally.late)


class IdleWatch:
    """`look` now and then; it compares with what it saw before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._mark = _Mark()
        self._seen: set[str] = set()
        self._logged_at: dict[str, float] = {}

    def look(self, facts: Facts) -> tuple[str, ...]:
        """What is wrong now, in words; logged when it begins."""
        idle = self._without_candidates(facts)
        reasons = (_synthetic(facts), _without_drafters(facts) or idle)
        found = dict(reason for reason in reasons if reason is not None)
        now = self._clock()
        young = now - self._began < GRACE_S
        for kind, text in found.items():
            due = now - self._logged_at.get(kind, -REPEAT_S) >= REPEAT_S
            if kind not in self._seen and not (young and kind == "drafters"):
                self._seen.add(kind)
                if due:
                    self._logged_at[kind] = now
                    logger.warning("%s", text)
        self._seen &= found.keys()
        return tuple(found.values())

    def _without_candidates(self, facts: Facts) -> tuple[str, str] | None:
        tally, mark = facts.tally, self._mark
        if not facts.enabled or tally.drafted > mark.drafted:
            self._mark = _Mark.of(tally)
            return None
        steps = tally.steps - mark.steps
        if steps < ENOUGH_STEPS:
            return None
        return "candidates", f"speculation is on, but {steps} decode steps had no candidate: {_why(facts, mark)}"


def _why(facts: Facts, mark: _Mark) -> str:
    tally = facts.tally
    if not (facts.lookup or facts.drafts_wanted):
        return "there is neither a drafter nor prompt lookup"
    if tally.requests - mark.requests == tally.declined - mark.declined > 0:
        return "every request asks for none"
    if facts.rests:
        return "drafting does not pay at this load, so the depth is 0"
    if late := tally.late - mark.late:
        return f"drafters are too late ({late} times)"
    return "no source has any" if facts.drafts_wanted else "prompt lookup is the only source, and nothing repeats"


def _without_drafters(facts: Facts) -> tuple[str, str] | None:
    if not facts.enabled or not facts.drafts_wanted or facts.drafters_connected:
        return None
    because = f" ({facts.problems})" if facts.problems else ""
    rest = "prompt lookup alone has candidates" if facts.lookup else "answers are right, and slower"
    return "drafters", f"speculation is on, but no drafter is connected{because}: {rest}"


def _synthetic(facts: Facts) -> tuple[str, str] | None:
    if facts.synthetic_acceptance is None:
        return None
    return (
        "synthetic",
        f"candidates are accepted with probability {facts.synthetic_acceptance:g}, whatever they are: "
        "the text is nonsense, for benchmarks only",
    )
