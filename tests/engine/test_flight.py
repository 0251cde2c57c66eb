"""One step ahead of the host: the tokens of an engine that waits for each step, and accounts that close."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from paceline.engine.engine import Engine
from paceline.engine.runner import Runner
from paceline.types import FinishReason, Request
from tests import tiny
from tests.engine import test_random_schedule as random_schedule
from tests.engine.launching import LaunchingRunner
from tests.engine.test_random_schedule import Arrival, Cancel, Drop, Evict, World, runs_as_alone, schedules

MODEL = tiny.tiny_llama()
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 5, 40, 100)]


def requests(**params: Any) -> list[Request]:
    return [tiny.request(ids, str(n), max_tokens=7 + 5 * n, **params) for n, ids in enumerate(PROMPTS)]


def engine(runner: Runner | None = None, **options: Any) -> Engine:
    return tiny.engine_for(MODEL, runner=runner or LaunchingRunner(MODEL), **options)


def plain(*each: Request, **options: Any) -> dict[str, list[int]]:
    return tiny.run(engine(tiny.ours(MODEL), **options), *each)


def closed(made: Engine) -> bool:
    """Whether nothing runs, and all room is free or cache."""
    made.check()
    return (made.num_running, made.num_waiting, made.kv.usage().in_use) == (0, 0, 0)


def under_way(request: Request, **options: Any) -> Engine:
    """An engine that has begun a step ahead."""
    made = engine(**options)
    made.add(request)
    made.step()  # the prompt
    made.step()
    return made


# What is ahead.


def test_a_step_is_begun_before_the_tokens_of_the_one_before_are_read() -> None:
    runner = LaunchingRunner(MODEL)
    tiny.run(engine(runner), tiny.request(PROMPTS[1], max_tokens=4))
    prompt, *decodes = "launch 1 read 1", "launch 2 launch 3 read 2", "launch 4 read 3", "read 4"
    assert " ".join(runner.notes) == " ".join((prompt, *decodes))


def test_no_step_follows_one_that_ends_all_by_their_length() -> None:
    runner = LaunchingRunner(MODEL)
    tiny.run(engine(runner), *(tiny.request(ids, str(n), max_tokens=3) for n, ids in enumerate(PROMPTS[:2])))
    assert runner.launched == 3


def test_prompts_in_chunks_are_not_run_ahead_of() -> None:
    runner = LaunchingRunner(MODEL)
    tiny.run(engine(runner, max_batched_tokens=16), tiny.request(PROMPTS[2], max_tokens=1))
    assert " ".join(runner.notes) == "launch 1 read 1 launch 2 read 2 launch 3 read 3"


def test_a_speculating_engine_looks_at_every_step() -> None:
    runner = LaunchingRunner(MODEL)
    tiny.run(engine(runner, lookup=3), tiny.request(PROMPTS[1] * 3, max_tokens=8))
    assert runner.notes == [f"{what} {n}" for n in range(1, runner.launched + 1) for what in ("launch", "read")]


# The same tokens.


@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("most_rows", [10_000, 3], ids=["all steps", "short steps"])
def test_several_lengths_together(params: dict[str, Any], most_rows: int) -> None:
    made = engine(LaunchingRunner(MODEL, most_rows=most_rows))
    assert tiny.run(made, *requests(**params)) == plain(*requests(**params))
    assert closed(made)


@pytest.mark.parametrize("at", range(6))
def test_an_end_in_the_middle(at: int) -> None:
    """The step begun after it has a token too many, which nobody gets."""
    whole = plain(*requests())
    ends = frozenset({whole["3"][at]})
    made = engine(eos=ends)
    assert tiny.run(made, *requests()) == plain(*requests(), eos=ends)
    assert closed(made)


def test_a_stop_token_of_one_request_ends_that_one() -> None:
    whole = plain(*requests())
    each = requests()
    stopping = tiny.request(PROMPTS[3], "3", max_tokens=22, stop_token_ids=(whole["3"][3],))
    assert tiny.run(engine(), *each[:3], stopping) == plain(*each[:3], stopping)


@pytest.mark.parametrize("steps", range(1, 6))
def test_an_abort_while_a_step_is_under_way(steps: int) -> None:
    made, whole = engine(), plain(*requests())
    for each in requests():
        made.add(each)
    given: dict[str, list[int]] = {str(n): [] for n in range(4)}
    for _ in range(steps):
        for name, delta in made.step().items():
            given[name] += delta.token_ids
    aborted = made.abort("1")
    for name, tokens in tiny.finish(made).items():
        given[name] += tokens
    assert aborted is not None and aborted.finish_reason is FinishReason.ABORT
    assert given == {**whole, "1": whole["1"][: len(given["1"])]}
    assert closed(made)


def test_what_a_step_under_way_draws_for_the_aborted_reaches_nobody() -> None:
    made = under_way(tiny.request(PROMPTS[1], "a"))
    made.abort("a")
    made.add(tiny.request(PROMPTS[2], "a", max_tokens=9))
    assert tiny.finish(made) == plain(tiny.request(PROMPTS[2], "a", max_tokens=9))


@pytest.mark.parametrize("steps", range(1, 5))
def test_arrivals_while_a_step_is_under_way(steps: int) -> None:
    made, given = engine(), {str(n): [] for n in range(4)}
    for each in requests(**SEEDED):
        made.add(each)
        for _ in range(steps):
            for name, delta in made.step().items():
                given[name] += delta.token_ids
    for name, tokens in tiny.finish(made).items():
        given[name] += tokens
    assert given == plain(*requests(**SEEDED))


def test_an_arrival_is_admitted_by_the_step_after_the_one_under_way() -> None:
    made = under_way(tiny.request(PROMPTS[1], "a"))
    made.add(tiny.request(PROMPTS[0], "b"))
    assert [sorted(made.step()) for _ in range(3)] == [["a"], ["a", "b"], ["a", "b"]]


def test_one_that_comes_first_takes_the_place_of_one_under_way() -> None:
    made = under_way(tiny.request(PROMPTS[1], "late"), max_num_seqs=1)
    made.add(replace(tiny.request(PROMPTS[0], "urgent", max_tokens=3), priority=-1))
    order = [name for name, _ in tiny.deltas(made)]
    assert order[:4] == ["late", *["urgent"] * 3]


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("ctx_size", [40, 48])
def test_a_streaming_window(block: int, ctx_size: int) -> None:
    each = [tiny.request(ids, str(n), max_tokens=60, ctx_size=ctx_size) for n, ids in enumerate(PROMPTS)]
    made = engine(LaunchingRunner(MODEL, block))
    assert tiny.run(made, *each) == plain(*each)
    assert closed(made)


def test_logprobs_are_of_the_step_they_belong_to() -> None:
    def told(made: Engine) -> list[float]:
        made.add(tiny.request(PROMPTS[1], max_tokens=5, logprobs=2))
        return [each.logprob for _, delta in tiny.deltas(made) for each in delta.logprobs]

    assert told(engine()) == told(engine(tiny.ours(MODEL)))


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.5}, {"min_tokens": 5}, {"logit_bias": ((5, 9.0),)}])
def test_draws_that_need_the_tokens_before_wait_for_them(params: dict[str, Any]) -> None:
    each = [*requests(), tiny.request(PROMPTS[1], "adjusted", **params)]
    assert tiny.run(engine(), *each) == plain(*each)


@seed(20240607)
@settings(max_examples=30)
@given(schedules, st.sampled_from([5, 24, 64]), st.sampled_from([1, 7, 16]), st.sampled_from([3, 10_000]))
def test_no_schedule_changes_a_token(
    schedule: list[tuple[int, Arrival | Cancel | Evict | Drop]], budget: int, block: int, most_rows: int
) -> None:
    runner = LaunchingRunner(random_schedule.MODEL, block, most_rows)
    made = tiny.engine_for(
        random_schedule.MODEL,
        runner=runner,
        capacity=random_schedule.CAPACITY // block * block,
        max_num_seqs=4,
        max_batched_tokens=budget,
    )
    runs_as_alone(World(made, None), schedule, False)
