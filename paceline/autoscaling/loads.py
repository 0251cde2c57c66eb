"""The load of a pool as one: sums of what its replicas do, means of what each of them is able to.

What is no number a replica could mean, below zero, infinite or not a number at all, is not known. Where some replicas
leave a number out, those that have it speak for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from statistics import fmean, median

from paceline.autoscaling.snapshot import DraftLoad, Snapshot, TargetLoad

LARGEST = 1e12
"""More than this counts as this, so that sums and products stay finite."""


@dataclass(frozen=True, slots=True)
class TargetPool:
    """`replicas` are wanted now, `reported` of them said what follows. None is not known."""

    replicas: int
    reported: int
    running: float | None = None
    waiting: float | None = None
    seats: float | None = None
    """Of one replica, as are the pace of prompts, KV's size and the start."""
    queued_prefill_tokens: float | None = None
    prefill_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    kv_in_use: float | None = None
    """In replicas: 1.5 is one cache full and another half full."""
    ttft_p95_s: float | None = None
    """Of the replica in the middle: one that is slow alone is not for more replicas to mend."""
    itl_p95_s: float | None = None
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class DraftPool:
    """The drafters, and what the targets say of them."""

    replicas: int
    reported: int
    busy: float | None = None
    """In replicas: 1.5 is one that always computes and another that does half of the time."""
    wanted: float | None = None
    """Sequences that would use drafts."""
    late: float | None = None
    """Share of the steps of these sequences that went without."""
    saved: float | None = None
    """Seconds of targets in a second."""

    @property
    def gain(self) -> float | None:
        """Seconds of targets that a second of a drafter saves."""
        return self.saved / self.reported if self.saved is not None and self.reported else None


def target_pool(seen: Snapshot) -> TargetPool:
    loads = seen.targets
    return TargetPool(
        replicas=max(0, seen.num_targets),
        reported=len(loads),
        running=_total(loads, "running"),
        waiting=_total(loads, "waiting"),
        seats=_able(loads, "seats"),
        queued_prefill_tokens=_total(loads, "queued_prefill_tokens"),
        prefill_tokens_per_s=_able(loads, "prefill_tokens_per_s"),
        prompt_tokens_per_s=_total(loads, "prompt_tokens_per_s"),
        requests_per_s=_total(loads, "requests_per_s"),
        kv_in_use=_total(loads, "kv_in_use", most=1.0),
        ttft_p95_s=_middle(loads, "ttft_p95_s"),
        itl_p95_s=_middle(loads, "itl_p95_s"),
        start_s=_able(loads, "start_s"),
    )


def draft_pool(seen: Snapshot) -> DraftPool:
    return DraftPool(
        replicas=max(0, seen.num_drafts),
        reported=len(seen.drafts),
        busy=_total(seen.drafts, "busy", most=1.0),
        wanted=_total(seen.targets, "drafts_wanted"),
        late=_late(seen.targets),
        saved=_total(seen.targets, "draft_saved", least=-1.0, most=LARGEST),
    )


Loads = Sequence[TargetLoad] | Sequence[DraftLoad]


def _known(loads: Loads, name: str, least: float = 0.0, most: float = LARGEST) -> list[float]:
    values = map(attrgetter(name), loads)
    return [value if value < most else most for value in values if value is not None and least <= value < inf]


def _total(loads: Loads, name: str, least: float = 0.0, most: float = LARGEST) -> float | None:
    known = _known(loads, name, least, most)
    return sum(known) * (len(loads) / len(known)) if known else None


def _able(loads: Loads, name: str) -> float | None:
    """Mean of what replicas are able to; one that is able to nothing does not know."""
    known = [value for value in _known(loads, name) if value > 0]
    return fmean(known) if known else None


def _middle(loads: Loads, name: str) -> float | None:
    known = _known(loads, name)
    return median(known) if known else None


def _late(loads: Sequence[TargetLoad]) -> float | None:
    """Mean over the sequences wanting drafts."""
    weighed = [
        (min(load.draft_late, 1.0), min(load.drafts_wanted, LARGEST))
        for load in loads
        if load.draft_late is not None and load.drafts_wanted is not None
        if load.draft_late >= 0 and 0 < load.drafts_wanted < inf
    ]
    weight = sum(wanted for _, wanted in weighed)
    return sum(late * wanted for late, wanted in weighed) / weight if weight else None
