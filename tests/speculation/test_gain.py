"""What drafts bring: counted by the controller, held against a world that knows what plain decoding takes."""

from __future__ import annotations

import pytest

from paceline.speculation.acceptance import Kind
from paceline.speculation.controller import Controller, FixedDepth, Spent
from paceline.speculation.cost import VerifyCost
from paceline.speculation.gain import DraftGain
from tests.speculation.world import World, flat_then_steep

STEPS = 1500


def saved(streams: int = 4, *, right: float, steps: int = STEPS, quotes: bool = False, **draft: float) -> World:
    """A world after so many steps with drafts that are `right` so often."""
    world = World(flat_then_steep, with_draft=True, lookup_tokens=8 if quotes else 0, noise=0.05)
    world.add(streams, quotes=quotes)
    world.draft.right = right
    for name, value in draft.items():
        setattr(world.draft, name, value)
    world.run(steps)
    return world


def counted(world: World) -> float:
    assert world.speculator is not None and world.speculator.draft_saved_s is not None
    return world.speculator.draft_saved_s


def truly(world: World) -> float:
    """What the same tokens take without drafts, less what they took."""
    streams = len(world.streams)
    return world.tokens / streams * flat_then_steep(streams) / 1e3 - world.now


def test_a_step_without_drafts_would_have_made_up_for_their_tokens() -> None:
    gain = DraftGain()
    gain.note(took=0.03, without=0.02, tokens=4, added=2, decode=0.02)
    assert gain.saved_s == pytest.approx(0.02 + 2 / 2 * 0.02 - 0.03)


def test_a_wait_in_vain_is_a_loss() -> None:
    gain = DraftGain()
    gain.note(took=0.05, without=0.02, tokens=1, added=0, decode=0.02)
    assert gain.saved_s == pytest.approx(-0.03)


@pytest.mark.parametrize("right", [0.4, 0.6, 0.8, 0.95])
def test_what_is_counted_is_what_was_saved(right: float) -> None:
    world = saved(right=right, wait_ms=1.0)
    assert counted(world) == pytest.approx(truly(world), abs=0.06 * world.now)


def test_a_draft_that_is_always_wrong_saves_nothing() -> None:
    assert counted(saved(right=0.0, wait_ms=5.0)) <= 0.0


def test_better_drafts_save_more() -> None:
    shares = [counted(world) / world.now for world in (saved(right=right) for right in (0.2, 0.5, 0.8, 0.95))]
    assert shares == sorted(shares)


def test_a_draft_that_slows_the_target_down_saves_less() -> None:
    """On the target's own cores."""
    alone = saved(right=0.8)
    sharing = World(flat_then_steep, with_draft=True, lookup_tokens=0, noise=0.05, shared=1.3).add(4)
    sharing.draft.right = 0.8
    sharing.run(STEPS)
    assert counted(sharing) / sharing.now < counted(alone) / alone.now - 0.2


def test_drafts_have_no_credit_for_what_the_prompt_said_as_well() -> None:
    repeating, new = saved(right=0.95, quotes=True), saved(right=0.95)
    assert counted(repeating) / repeating.now < 0.5 * counted(new) / new.now


def test_steps_without_drafts_count_for_nothing() -> None:
    controller = Controller(VerifyCost({1: 0.01, 8: 0.012}))
    controller.note_step(Spent(2, 6, 0, 6, 0.011, 0.0, frozenset({Kind.LOOKUP})))
    controller.note_step(Spent(2, 2, 0, 2, 0.010, 0.0))
    assert controller.gain.saved_s == 0.0


def test_beside_lookup_drafts_are_held_against_a_step_with_lookup_alone() -> None:
    cost = VerifyCost({1: 0.010, 2: 0.011, 3: 0.012, 4: 0.013})
    controller = Controller(cost)
    spent = Spent(2, 4, 0, 4, 0.014, 0.0, frozenset(Kind), draft_rows=1, added=1)
    controller.note_step(spent)
    # A step of 12 ms, and a third of another one.
    assert controller.gain.saved_s == pytest.approx(0.012 + 0.012 / 3 - 0.014)


def test_a_fixed_depth_does_not_judge_drafts() -> None:
    world = World(flat_then_steep, policy=lambda _: FixedDepth(4), with_draft=True, lookup_tokens=0).add(2)
    world.run(20)
    assert world.speculator is not None and world.speculator.draft_saved_s is None


def test_without_drafts_nobody_wants_them() -> None:
    world = World(flat_then_steep).add(2)
    world.run(5)
    assert world.speculator is not None
    assert world.speculator.drafts_wanted is None
    assert world.speculator.demand.steps == 0


# What is asked of drafters.


def fixed(streams: int = 3, **draft: object) -> World:
    world = World(flat_then_steep, policy=lambda _: FixedDepth(4), with_draft=True, lookup_tokens=0).add(streams)
    for name, value in draft.items():
        setattr(world.draft, name, value)
    return world


def test_candidates_asked_for_are_counted() -> None:
    world = fixed(3)
    world.run(10)
    assert world.speculator is not None
    assert (world.speculator.demand.tokens, world.speculator.demand.steps) == (3 * 4 * 10, 3 * 10)


def test_late_drafts_are_steps_without() -> None:
    world = fixed(3, there=False)
    world.run(11)
    assert world.speculator is not None
    # What the first step asked for, the second one misses.
    assert (world.speculator.demand.steps, world.speculator.demand.without) == (3 * 11, 3 * 10)


def test_sequences_that_no_drafter_has_are_steps_without() -> None:
    world = fixed(3)
    world.draft.serves = lambda _: False  # type: ignore[method-assign]
    world.run(10)
    assert world.speculator is not None
    demand = world.speculator.demand
    assert (demand.tokens, demand.steps, demand.without) == (0, 30, 30)


def test_one_that_no_drafter_has_wants_nothing_where_the_others_want_nothing() -> None:
    world = saved(3, right=0.0, wait_ms=20.0)
    speculator = world.speculator
    assert speculator is not None
    before = speculator.demand.steps
    world.draft.serves = lambda sequence: sequence != 1  # type: ignore[method-assign]
    world.run(3)
    assert speculator.demand.steps == before


def test_sequences_want_drafts_also_while_none_are_worth_asking_for() -> None:
    world = saved(3, right=0.0, wait_ms=20.0)
    assert world.speculator is not None and world.candidates < 10
    assert world.speculator.drafts_wanted == 3
