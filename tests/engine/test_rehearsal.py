"""A drafter that has rehearsed is as good as new, and has run all it will run."""

from __future__ import annotations

from paceline.engine.drafter import Drafter
from paceline.engine.rehearsal import rehearse
from paceline.types import SamplingParams
from tests import tiny
from tests.engine.test_drafter import drafter as new


def rehearsed() -> tuple[Drafter, list[list[int]]]:
    drafter, batches = new()
    rehearse(drafter)
    return drafter, batches


def test_nothing_is_left_of_it() -> None:
    drafter, _ = rehearsed()
    usage = drafter.kv.usage()
    assert (drafter.num_sequences, drafter.has_work, usage.in_use, usage.cached) == (0, False, 0, 0)
    assert (drafter.drafted_tokens, drafter.rolled_back_tokens, drafter.passes) == (0, 0, 0)


def test_it_computes_prompts_and_single_tokens_of_one_and_of_several_sequences() -> None:
    _, batches = rehearsed()
    assert {(len(batch), max(batch) > 1) for batch in batches} >= {(1, True), (1, False), (4, False)}


def test_it_drafts_the_same_afterwards() -> None:
    prompt, params = tiny.prompt(17, seed=17), SamplingParams(temperature=0.8, seed=11)

    def drafted(drafter: Drafter) -> list[tuple[int, ...]]:
        drafter.open("a", prompt, params, 5)
        return [answer.tokens for _ in range(8) for answer in drafter.step()]

    assert drafted(rehearsed()[0]) == drafted(new()[0])
