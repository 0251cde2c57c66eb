"""The pool of drafters over what drafts really bring: the real controller counts it, the real policy judges it.

Steps cost what a formula says; two sequences are all a drafter can follow.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import pytest

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.presets import resolved
from paceline.autoscaling.snapshot import DraftLoad, Reason, Snapshot, TargetLoad
from paceline.config_autoscaling import AutoscalingSettings
from tests.speculation.world import World, flat_then_steep

STREAMS, EACH = 4, 2
SECONDS = 90
BUSY = 0.35
"""Of a drafter's time, for a sequence."""
GOALS = resolved(
    AutoscalingSettings.model_validate(
        {"downscale_delay_s": 30, "upscale_delay_s": 0, "draft": {"min_gain": 0.25, "max_replicas": 3}}
    )
)


@dataclass
class Course:
    """`gains`: seconds saved in each second, for each drafter, while there were as many as at first."""

    gains: list[float]
    drafters: int
    reasons: set[Reason]


@functools.cache
def course(right: float) -> Course:
    """What becomes of a pool of one drafter whose candidates are right so often."""
    world = World(flat_then_steep, with_draft=True, lookup_tokens=0, noise=0.02).add(STREAMS)
    world.draft.right, world.draft.wait_ms = right, 1.0
    policy, seen = LoadPolicy(GOALS), Course([], 1, set())
    world.draft.serves = lambda sequence: sequence <= EACH * seen.drafters  # type: ignore[method-assign]
    for _ in range(SECONDS):
        load = _second(world)
        served = min(STREAMS, EACH * seen.drafters)
        drafts = tuple(DraftLoad(str(n), busy=BUSY * served / seen.drafters) for n in range(seen.drafters))
        if seen.drafters == 1:
            assert load.draft_saved is not None
            seen.gains.append(load.draft_saved)
        decision = policy.decide(Snapshot(world.now, 1, seen.drafters, (load,), drafts)).draft
        seen.drafters = decision.replicas
        seen.reasons |= {decision.reason} if decision.changes else set()
    return seen


def _second(world: World) -> TargetLoad:
    speculator = world.speculator
    assert speculator is not None and speculator.draft_saved_s is not None
    began, saved = world.now, speculator.draft_saved_s
    steps, without = speculator.demand.steps, speculator.demand.without
    while world.now < began + 1.0:
        world.step()
    steps = speculator.demand.steps - steps
    return TargetLoad(
        "t",
        running=STREAMS,
        waiting=0.0,
        seats=16.0,
        drafts_wanted=float(speculator.drafts_wanted or 0),
        draft_late=(speculator.demand.without - without) / steps if steps else None,
        draft_saved=(speculator.draft_saved_s - saved) / (world.now - began),
    )


def test_drafters_that_are_never_right_are_scaled_to_their_minimum() -> None:
    assert course(0.05).drafters == GOALS.draft.min_replicas == 0


def test_they_go_for_what_they_did_not_save() -> None:
    assert course(0.05).reasons == {Reason.GAIN}


def test_drafters_that_are_right_become_as_many_as_are_wanted() -> None:
    assert course(0.8).drafters == STREAMS // EACH


@pytest.mark.parametrize("right", [0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_the_crossover_is_where_the_measured_gain_is(right: float) -> None:
    found = course(right)
    assert (found.drafters > 0) is (statistics.fmean(found.gains[10:]) >= float(GOALS.draft.min_gain))


def test_between_the_ends_there_is_one_crossover() -> None:
    kept = [course(right).drafters > 0 for right in (0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)]
    assert kept == sorted(kept)
