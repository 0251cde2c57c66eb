"""Candidates drafted in a chain, each from the one before and none looked at: the same as step by step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.drafter import Drafter
from paceline.engine.runner import Runner
from paceline.speculation.local import LocalProposer
from paceline.types import SamplingParams
from tests import tiny
from tests.engine.launching import LaunchingRunner

MODEL = tiny.tiny_llama(num_hidden_layers=1)
TARGET = tiny.tiny_llama()
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
PENALIZED = SamplingParams(temperature=0.0, repetition_penalty=1.5)
PROMPTS = [tiny.prompt(n, seed=n) for n in (3, 17, 40, 90)]


def drafter(runner: Runner | None = None, capacity: int = 4096) -> Drafter:
    runner = runner or LaunchingRunner(MODEL)
    return Drafter(runner, tiny.kv_for(runner, capacity), max_batched_tokens=64, max_model_len=128)


def drain(made: Drafter) -> dict[object, tuple[int, tuple[int, ...]]]:
    """By sequence: how much is agreed, and all that was said to follow."""
    found: dict[object, tuple[int, tuple[int, ...]]] = {}
    while made.has_work:
        for answer in made.step():
            assert answer.failure is None
            before = found.get(answer.key, (0, ()))[1] if answer.offset else ()
            found[answer.key] = answer.base, before + answer.tokens
        made.kv.check()
    return found


def opened(made: Drafter, depths: Sequence[int], params: SamplingParams = SEEDED, **options: int) -> Drafter:
    for key, (prompt, depth) in enumerate(zip(PROMPTS, depths, strict=False)):
        made.open(key, prompt, params, depth, **options)
    return made


def step_by_step() -> Drafter:
    return drafter(tiny.ours(MODEL))


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("depths", [(6,), (4, 4, 4), (1, 5, 3, 7)], ids=str)
def test_candidates_are_those_drafted_step_by_step(depths: tuple[int, ...], params: SamplingParams) -> None:
    assert drain(opened(drafter(), depths, params)) == drain(opened(step_by_step(), depths, params))


def test_no_token_is_read_before_all_that_is_owed_is_launched() -> None:
    runner = LaunchingRunner(MODEL)
    drain(opened(drafter(runner), (4,)))
    assert " ".join(runner.notes) == "launch 1 launch 2 launch 3 launch 4 read 1 read 2 read 3 read 4"


def test_a_chain_is_as_long_as_what_the_shortest_owes() -> None:
    runner = LaunchingRunner(MODEL)
    drain(opened(drafter(runner), (2, 5)))
    first, second = "launch 1 launch 2 read 1 read 2", "launch 3 launch 4 launch 5 read 3 read 4 read 5"
    assert " ".join(runner.notes) == f"{first} {second}"


def test_a_chain_counts_its_passes_and_tokens() -> None:
    made = opened(drafter(), (4, 4))
    drain(made)
    assert (made.passes, made.drafted_tokens) == (4, 8)


def test_draws_that_need_the_tokens_before_are_not_chained() -> None:
    runner = LaunchingRunner(MODEL)
    found = drain(opened(drafter(runner), (5, 3), PENALIZED))
    assert (found, runner.launched) == (drain(opened(step_by_step(), (5, 3), PENALIZED)), 0)


def test_a_chain_ends_with_the_context() -> None:
    made, plain = drafter(), step_by_step()
    for each in (made, plain):
        each.open("s", tiny.prompt(125), GREEDY, depth=8)
    assert drain(made) == drain(plain)


@pytest.mark.parametrize("ctx_size", [40, 48])
def test_a_chain_ends_before_a_window_shifts(ctx_size: int) -> None:
    params = SamplingParams(temperature=0.0, ctx_size=ctx_size, n_keep=4, n_discard=8)
    made, plain = drafter(), step_by_step()
    for each in (made, plain):
        each.open("s", tiny.prompt(ctx_size - 2), params, depth=8)
    assert drain(made) == drain(plain)


def test_what_is_ahead_is_drafted_as_step_by_step() -> None:
    options = {"ahead": 4, "streaming": True}
    assert drain(opened(drafter(), (3, 2), **options)) == drain(opened(step_by_step(), (3, 2), **options))


rounds = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans(), st.integers(0, 6)), min_size=1, max_size=8
)


@settings(max_examples=25)
@given(rounds, st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_any_history_of_acceptance_drafts_as_step_by_step(
    history: list[tuple[int, int, bool, int]], depths: list[int]
) -> None:
    chained, plain = opened(drafter(), depths), opened(step_by_step(), depths)
    texts = [list(prompt) for prompt in PROMPTS[:3]]
    for key, agreed, right, depth in history:
        found, wanted = drain(chained), drain(plain)
        assert found == wanted
        drafted = wanted.get(key, (0, ()))[1]
        new = [*drafted[:agreed], 3 if right else 4]
        for each in (chained, plain):
            each.advance(key, len(texts[key]), new, depth)
        texts[key] += new
    assert drain(chained) == drain(plain)
    for key in range(3):
        chained.close(key)
    assert chained.kv.usage().in_use == 0


def test_an_engine_with_such_drafts_says_what_it_says_alone() -> None:
    each = [tiny.request(prompt, str(n), temperature=0.8, seed=3) for n, prompt in enumerate(PROMPTS)]
    for draft in (MODEL, TARGET):
        proposer = LocalProposer(drafter(LaunchingRunner(draft)))
        engine = tiny.engine_for(TARGET, runner=LaunchingRunner(TARGET), proposer=proposer, depth=5)
        assert tiny.run(engine, *each) == tiny.run(tiny.engine_for(TARGET), *each)


def test_one_step_answers_all_that_is_owed() -> None:
    (answer,) = opened(drafter(), (5,)).step()
    assert len(answer.tokens) == 5
