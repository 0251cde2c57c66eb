"""What a policy sees, and what it says: plain frozen data.

Rates and quantiles are of the last seconds as each replica measured them itself, by its own clock: nothing here is a
difference of two counters or two clocks. None is "not known": a replica that has not reported, or nothing happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self


class Pool(StrEnum):
    """The two pools that are scaled."""

    TARGET = "target"
    DRAFT = "draft"


class Reason(StrEnum):
    """Why a pool has the size it has; a bounded set, for metrics."""

    STEADY = "steady"
    """As many as are needed."""
    SEATS = "seats"
    """Sequences running and waiting against those the replicas run within the objective."""
    KV = "kv"
    """KV in use."""
    PREFILL = "prefill"
    """Prompt tokens that arrive or wait."""
    TTFT = "ttft"
    """The time to first token is over its objective."""
    ITL = "itl"
    """The time between tokens is over its objective."""
    FORECAST = "forecast"
    """Load that is expected by the time a replica has started."""
    DEMAND = "demand"
    """Drafts asked for, against what the drafters compute."""
    LATE = "late"
    """Steps that went without the drafts they wanted."""
    GAIN = "gain"
    """What drafters save is less than what they cost."""
    RETRY = "retry"
    """A drafter is tried again."""
    IDLE = "idle"
    """Fewer are enough."""
    BOUNDS = "bounds"
    """The settings' fewest or most."""
    UNKNOWN = "unknown"
    """Nothing is known of the load: the pool stays as it is."""


class _Reported:
    """Reads what a replica reports, `{name: number}`; what is missing or no number is None."""

    @classmethod
    def of(cls, replica: str, numbers: Mapping[str, Any]) -> Self:
        known = {
            each.name: float(value)
            for each in fields(cls)  # type: ignore[arg-type]
            if isinstance(value := numbers.get(each.name), int | float) and value == value
        }
        return cls(replica=replica, **known)  # type: ignore[call-arg]

    def numbers(self) -> dict[str, float]:
        """As a replica reports it: what is known."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return {name: float(value) for name, value in named.items() if name != "replica" and value is not None}


@dataclass(frozen=True, slots=True)
class TargetLoad(_Reported):
    """One target replica."""

    replica: str
    running: float | None = None
    """Sequences in its steps, mean of the last seconds."""
    waiting: float | None = None
    seats: float | None = None
    """Sequences it runs within the objective for the time between tokens."""
    queued_prefill_tokens: float | None = None
    prefill_tokens_per_s: float | None = None
    """The pace at which it computes prompts, while it does."""
    prompt_tokens_per_s: float | None = None
    """Prompt tokens that arrived and have to be computed: those without KV."""
    output_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    """Requests that arrived."""
    kv_in_use: float | None = None
    """Of its KV cache by running sequences, 0 to 1."""
    ttft_p95_s: float | None = None
    itl_p95_s: float | None = None
    sessions: float | None = None
    """Sessions whose KV it holds on its device or in host memory."""
    start_s: float | None = None
    """How long it took to start."""
    drafts_wanted: float | None = None
    """Sequences that would use drafts, if there were any worth it: running, and not told to do without."""
    draft_tokens_wanted_per_s: float | None = None
    """Candidates it asks drafters for: sequences × depth × steps a second."""
    draft_late: float | None = None
    """Share of the steps of sequences wanting drafts that had none in time, 0 to 1."""
    draft_saved: float | None = None
    """Seconds that drafts save it in a second; negative if they cost more than they save."""
    busy: float | None = None
    """Share of the last seconds in which it was in a step, 0 to 1."""


@dataclass(frozen=True, slots=True)
class DraftLoad(_Reported):
    """One draft replica."""

    replica: str
    busy: float | None = None
    """Share of the last seconds in which it computed, 0 to 1."""
    tokens_per_s: float | None = None
    sequences: float | None = None
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Both pools at one moment.

    `now` is of a clock that never goes back; only differences mean anything. `num_targets` replicas are wanted now,
    those of them that run and have reported are `targets`; `drafts` likewise.
    """

    now: float
    num_targets: int
    num_drafts: int
    targets: tuple[TargetLoad, ...] = ()
    drafts: tuple[DraftLoad, ...] = ()
    has_drafts: bool = True
    """Whether there is a pool of drafters at all."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas a pool should have: `replicas`, in place of `before`. `text` says it with numbers."""

    pool: Pool
    before: int
    replicas: int
    reason: Reason
    text: str

    @property
    def changes(self) -> bool:
        return self.replicas != self.before


@dataclass(frozen=True, slots=True)
class Decisions:
    """Of one look at the load. `signals` has the replicas that each signal asks for, whole or not."""

    target: Decision
    draft: Decision
    signals: Mapping[tuple[Pool, Reason], float] = field(default_factory=dict)
