"""The adaptive depth over simulated loads: what it loses, what it finds, when it stops and when it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from paceline.speculation.acceptance import Kind
from paceline.speculation.controller import Choice, Controller, FixedDepth, Offer, Spent
from paceline.speculation.cost import VerifyCost
from tests.speculation.world import World, flat_then_steep, steps_of_six

LOSS = 0.97
"""Never slower than plain decoding by more than 3%, on any load."""
COSTS = pytest.mark.parametrize("cost", [flat_then_steep, steps_of_six])
BATCHES = pytest.mark.parametrize("streams", [1, 4, 16])


def plain(cost: Callable[[int], float], streams: int, steps: int = 600, **world: float) -> float:
    return World(cost, None, **world).add(streams).run(steps)  # type: ignore[arg-type]


def drafted(cost: Callable[[int], float], streams: int, *, right: float, **options: object) -> World:
    """A world with a draft and no prompt lookup; options of the draft, and `shared`, `policy`, `curve` of the world."""
    own = {name: options.pop(name) for name in ("shared", "policy", "curve", "prefill") if name in options}
    world = World(cost, with_draft=True, lookup_tokens=0, **own).add(streams)  # type: ignore[arg-type]
    world.draft.right = right
    for name, value in options.items():
        setattr(world.draft, name, value)
    return world


# Never much slower than plain decoding.


def test_a_slow_beginning_does_not_end_speculation() -> None:
    """Such as a GPU's kernels, which load when the draft first runs: 100 plain steps, once."""
    controller = Controller(VerifyCost({1: 0.01, 8: 0.012}))
    plain_step = Spent(windows=1, drawn=1, prefill=0, tokens=1, forward_s=0.01, other_s=0.0)
    slow = replace(plain_step, drawn=2, other_s=1.0, used=frozenset({Kind.DRAFT}))
    for spent in (*[plain_step] * 8, slow, *[plain_step] * 8):
        controller.note_step(spent)
    assert not controller.rests(Kind.DRAFT)
    for spent in ([slow] * 4 + [plain_step] * 4) * 2:
        controller.note_step(spent)
    assert controller.rests(Kind.DRAFT)


@COSTS
@BATCHES
def test_text_without_repetition_costs_nothing(cost: Callable[[int], float], streams: int) -> None:
    assert World(cost).add(streams).run(1000) > LOSS * plain(cost, streams)


@COSTS
@BATCHES
@pytest.mark.parametrize(
    "draft",
    [
        {"right": 0.0, "token_ms": 1.0},
        {"right": 0.8, "token_ms": 12.0},
        {"right": 0.8, "wait_ms": 200.0},
        {"right": 0.8, "there": False, "wait_ms": 20.0},
        {"right": 0.8, "shared": 2.5},
        {"right": 0.3, "curve": lambda rows: 5.0 + 0.01 * rows},
    ],
    ids=["always wrong", "as slow as the target", "far away", "dead", "on the target's cores", "a wrong curve"],
)
@pytest.mark.slow
def test_no_draft_costs_more_than_it_may(cost: Callable[[int], float], streams: int, draft: dict[str, object]) -> None:
    assert drafted(cost, streams, **draft).run(1500) > LOSS * plain(cost, streams)  # type: ignore[arg-type]


@COSTS
def test_prompts_beside_the_streams_are_not_slowed_down(cost: Callable[[int], float]) -> None:
    """Prompt tokens take a while; candidates beside them are worth only what they save later."""
    world = drafted(cost, 4, right=0.4, token_ms=0.5, prefill=64)
    world.run(500)
    spent = world.now / 500
    bare = World(cost, None, prefill=64).add(4)
    bare.run(500)
    assert spent < 1.06 * bare.now / 500


# Close to the best there is.


@COSTS
@BATCHES
@pytest.mark.parametrize("right", [0.5, 0.8])
@pytest.mark.slow
def test_within_five_percent_of_the_best_fixed_depth(cost: Callable[[int], float], streams: int, right: float) -> None:
    fixed = [plain(cost, streams)] + [
        drafted(cost, streams, right=right, token_ms=1.0, policy=lambda _, depth=depth: FixedDepth(depth)).run(400)
        for depth in (1, 2, 3, 4, 5, 6, 8)
    ]
    world = drafted(cost, streams, right=right, token_ms=1.0)
    world.run(200)
    assert world.run(800) > 0.95 * max(fixed)


def test_repeated_text_is_found_by_prompt_lookup() -> None:
    assert World(flat_then_steep).add(quotes=True).run(1500) > 3 * plain(flat_then_steep, 1)


def test_a_sequence_that_quotes_gets_the_candidates_and_its_neighbours_do_not() -> None:
    world = World(flat_then_steep).add(3).add(1, quotes=True)
    world.run(300)
    lengths = [stream.length for stream in world.streams.values()]
    assert all(length == 400 + 300 for length in lengths[:3])
    assert lengths[3] > 400 + 2 * 300


def test_a_draft_that_becomes_good_is_noticed() -> None:
    world = drafted(flat_then_steep, 1, right=0.0, token_ms=1.0)
    world.run(1000)
    world.draft.right = 0.9
    world.run(500)
    assert world.run(500) > 2 * plain(flat_then_steep, 1)


def test_a_draft_that_becomes_bad_is_dropped() -> None:
    world = drafted(flat_then_steep, 1, right=0.9, token_ms=1.0)
    world.run(500)
    world.draft.right = 0.0
    world.run(100)
    asked = world.draft.asked
    world.run(500)
    assert world.draft.asked - asked < 50


# Load.


def test_depth_falls_to_zero_under_load_and_returns() -> None:
    world = drafted(flat_then_steep, 1, right=0.7, token_ms=1.0)
    world.run(300)
    alone = world.run(300)
    before = world.candidates
    world.add(23)
    world.run(300)
    under_load = world.candidates - before
    world.remove(23)
    world.run(50)
    assert under_load < 24 * 300 * 0.02
    assert world.run(300) > 0.95 * alone


def test_a_machine_that_slows_down_for_everybody_is_not_held_against_drafts() -> None:
    world = drafted(flat_then_steep, 1, right=0.8, token_ms=1.0)
    world.run(500)
    world.slow = 2.0
    world.run(300)
    asked = world.draft.asked
    world.run(300)
    assert world.draft.asked - asked > 250


def test_cores_that_become_free_bring_drafts_back() -> None:
    world = drafted(flat_then_steep, 1, right=0.8, token_ms=1.0, shared=4.0)
    world.run(1000)
    world.shared = 1.0
    world.run(1500)
    assert world.run(300) > 2 * plain(flat_then_steep, 1)


# Single decisions.


def controller(points: dict[int, float]) -> Controller:
    """One that has seen its plain steps."""
    found = Controller(VerifyCost(points))
    world = World(flat_then_steep, lambda _: found, noise=0.0).add(1)
    world.run(10)
    return found


def test_without_offers_there_is_nothing_to_take() -> None:
    assert controller({1: 0.01, 64: 0.02}).take({1: []}, 0) == {}


def test_fixed_depth_prefers_the_draft() -> None:
    offers = {1: [Offer(Kind.LOOKUP, 8, 3), Offer(Kind.DRAFT, 2)], 2: [Offer(Kind.LOOKUP, 8, 3)], 3: []}
    assert FixedDepth(4).take(offers, 0) == {1: Choice(Kind.DRAFT, 2), 2: Choice(Kind.LOOKUP, 4)}


def test_a_tile_of_the_kernel_is_filled_and_not_exceeded() -> None:
    """Rows up to the edge of a tile are free, the next one costs as much as the whole pass."""
    points = {rows: 0.01 if rows <= 6 else 0.02 for rows in range(1, 13)}
    world = World(lambda rows: 1e3 * points[min(rows, 12)], with_draft=True, lookup_tokens=0, noise=0.0)
    world.draft.right = 0.8
    world.add(1)
    world.run(60)
    candidates = world.candidates
    world.run(20)
    assert world.candidates - candidates == 20 * 5
