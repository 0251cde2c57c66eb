"""Pools as the tests describe them, and a policy followed look by look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.snapshot import Decisions, DraftLoad, Snapshot, TargetLoad
from paceline.config_autoscaling import AutoscalingSettings, DraftScaling, TargetScaling

BUSY = TargetLoad(
    "busy",
    running=8,
    waiting=0,
    seats=16,
    queued_prefill_tokens=0,
    prefill_tokens_per_s=1000,
    prompt_tokens_per_s=100,
    output_tokens_per_s=200,
    requests_per_s=1,
    kv_in_use=0.25,
    ttft_p95_s=0.2,
    itl_p95_s=0.02,
    sessions=20,
    start_s=60,
    drafts_wanted=8,
    draft_tokens_wanted_per_s=300,
    draft_late=0.0,
    draft_saved=0.5,
)


def settings(
    least: int = 1,
    most: int = 100,
    drafts: tuple[int, int] = (0, 10),
    *,
    utilization: float = 0.8,
    min_gain: float = 0.25,
    **others: object,
) -> AutoscalingSettings:
    return AutoscalingSettings(
        target=TargetScaling(min_replicas=least, max_replicas=most, utilization=utilization),
        draft=DraftScaling(
            min_replicas=drafts[0], max_replicas=drafts[1], utilization=utilization, min_gain=min_gain, retry_s=600
        ),
        **others,
    )


def targets(count: int, **numbers: float | None) -> tuple[TargetLoad, ...]:
    return tuple(replace(BUSY, replica=f"t{index}", **numbers) for index in range(count))


def drafters(count: int, **numbers: float | None) -> tuple[DraftLoad, ...]:
    return tuple(DraftLoad(f"d{index}", **{"busy": 0.5, **numbers}) for index in range(count))


Load = Callable[["Pools"], tuple[tuple[TargetLoad, ...], tuple[DraftLoad, ...]]]


@dataclass
class Pools:
    """As many replicas as the policy said a second ago, all of them running."""

    policy: LoadPolicy
    num_targets: int = 1
    num_drafts: int = 0
    now: float = 0.0
    made: list[Decisions] = field(default_factory=list)

    def look(self, load: Load, *, after: float = 1.0) -> Decisions:
        self.now += after
        decisions = self.policy.decide(Snapshot(self.now, self.num_targets, self.num_drafts, *load(self)))
        self.num_targets, self.num_drafts = decisions.target.replicas, decisions.draft.replicas
        self.made.append(decisions)
        return decisions

    def run(self, seconds: int, load: Load) -> Decisions:
        for _ in range(seconds):
            last = self.look(load)
        return last


def sequences(count: float, *, wanted: float = 0.0, saved: float = 0.0, computed: float = 0.0) -> Load:
    """`count` sequences spread over the targets; those with a seat run. `computed` is the work of all drafters."""

    def load(pools: Pools) -> tuple[tuple[TargetLoad, ...], tuple[DraftLoad, ...]]:
        here, drafts = max(1, pools.num_targets), pools.num_drafts
        each = count / here
        running = targets(
            here,
            running=min(16, each),
            waiting=max(0, each - 16),
            prompt_tokens_per_s=0,
            requests_per_s=each / 10,
            kv_in_use=min(1.0, each / 40),
            drafts_wanted=wanted / here,
            draft_saved=saved / here if drafts else 0.0,
        )
        return running, drafters(drafts, busy=min(1.0, computed / drafts)) if drafts else ()

    return load
