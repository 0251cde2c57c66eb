"""The drafter against the models it imitates: same tokens whatever was rolled back, batched or reopened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.attention import Window
from paceline.engine.drafter import Drafted, Drafter
from paceline.engine.reduced_vocab import ReducedVocabRunner
from paceline.engine.runner import ModelRunner
from paceline.errors import ModelError
from paceline.speculation.frames import DraftFailureReason
from paceline.types import SamplingParams
from tests import tiny

MODEL = tiny.tiny_llama()
PROMPT = tiny.prompt(17, seed=17)
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
CONTEXT = 512


class CountingRunner(ModelRunner):
    """Knows how many tokens each forward pass computed."""

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        self.batches.append([len(window.token_ids) for window in windows])
        return super().run(windows)

    @property
    def batches(self) -> list[list[int]]:
        return self.__dict__.setdefault("batches", [])


def drafter(capacity: int = 4096, budget: int = 64) -> tuple[Drafter, list[list[int]]]:
    runner = CountingRunner(tiny.ours(MODEL).model)
    made = Drafter(runner, tiny.kv_for(runner, capacity), max_batched_tokens=budget, max_model_len=CONTEXT)
    return made, runner.batches


def drain(made: Drafter) -> list[Drafted]:
    found = []
    while made.has_work:
        found += made.step()
        made.kv.check()
    return found


def only(made: Drafter) -> tuple[int, ...]:
    (answer,) = drain(made)
    assert answer.failure is None
    return answer.tokens


def continuation(tokens: Sequence[int], n: int, params: SamplingParams = GREEDY) -> tuple[int, ...]:
    """What the model itself says next."""
    if params.greedy:
        return tuple(tiny.generate(MODEL, tuple(tokens), n))
    sampling = {"temperature": params.temperature, "top_p": params.top_p, "seed": params.seed, "max_tokens": n}
    return tuple(tiny.run(tiny.engine_for(MODEL), tiny.request(tuple(tokens), **sampling))["r"])


def wrong(token: int) -> int:
    return (token + 1) % tiny.VOCAB


# Drafting.


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_candidates_are_what_the_target_will_say(params: SamplingParams) -> None:
    made, _ = drafter()
    made.open("s", PROMPT, params, depth=8)
    assert drain(made) == [Drafted("s", len(PROMPT), continuation(PROMPT, 8, params))]


def test_depth_zero_prefills_and_says_nothing() -> None:
    made, batches = drafter()
    made.open("s", PROMPT, GREEDY, depth=0)
    assert (drain(made), batches) == ([], [[17]])


def test_a_prefilled_sequence_computes_only_what_is_new() -> None:
    made, batches = drafter()
    made.open("s", PROMPT, GREEDY, depth=0)
    drain(made)
    made.advance("s", len(PROMPT), [5], depth=3)
    drain(made)
    assert batches[1:] == [[1], [1], [1]]


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    made, batches = drafter(budget=7)
    made.open("s", PROMPT, GREEDY, depth=2)
    assert (only(made), batches) == (continuation(PROMPT, 2), [[7], [7], [3], [1]])


def test_a_long_prompt_does_not_delay_a_running_draft() -> None:
    made, _ = drafter(budget=8)
    made.open("long", tiny.prompt(100), GREEDY, depth=0)
    made.open("short", PROMPT[:3], GREEDY, depth=1)
    assert [answer.key for answer in made.step()] == ["short"]


def test_an_answer_comes_once() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=2)
    drain(made)
    assert (made.has_work, made.step()) == (False, [])


# Advancing.


def test_full_acceptance_goes_on_from_the_bonus_token() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 10)
    made.open("s", PROMPT, GREEDY, depth=4)
    drain(made)
    made.advance("s", len(PROMPT), truth[:5], depth=4)
    assert drain(made) == [Drafted("s", len(PROMPT) + 5, truth[5:9])]


def test_full_acceptance_computes_two_tokens_and_then_one_at_a_time() -> None:
    made, batches = drafter()
    truth = continuation(PROMPT, 10)
    made.open("s", PROMPT, GREEDY, depth=4)
    drain(made)
    before = len(batches)
    made.advance("s", len(PROMPT), truth[:5], depth=4)
    drain(made)
    # The last candidate was drawn but never fed back, so it is computed together with the bonus token.
    assert batches[before:] == [[2], [1], [1], [1]]


@pytest.mark.parametrize("agreed", range(4))
def test_a_rejected_run_leaves_no_trace(agreed: int) -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=4)
    drafted = only(made)
    new = (*drafted[:agreed], wrong(drafted[agreed]))
    made.advance("s", len(PROMPT), new, depth=5)
    assert only(made) == continuation((*PROMPT, *new), 5)


def test_a_rejected_run_leaves_no_trace_in_seeded_drafts() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, SEEDED, depth=4)
    drafted = only(made)
    new = (*drafted[:2], wrong(drafted[2]))
    made.advance("s", len(PROMPT), new, depth=5)
    fresh, _ = drafter()
    fresh.open("s", (*PROMPT, *new), SEEDED, depth=5)
    assert only(made) == only(fresh)


def test_advancing_by_fewer_tokens_than_drafted_keeps_the_rest() -> None:
    made, batches = drafter()
    made.open("s", PROMPT, GREEDY, depth=4)
    drafted = only(made)
    before = len(batches)
    made.advance("s", len(PROMPT), drafted[:2], depth=2)
    assert (drain(made), len(batches)) == ([Drafted("s", len(PROMPT) + 2, drafted[2:])], before)


def test_kept_candidates_are_drafted_on_from() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 8)
    made.open("s", PROMPT, GREEDY, depth=4)
    drain(made)
    made.advance("s", len(PROMPT), truth[:2], depth=6)
    assert only(made) == truth[2:8]


def test_a_shallower_depth_gives_no_more_than_that() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=4)
    drafted = only(made)
    made.advance("s", len(PROMPT), drafted[:1], depth=1)
    assert only(made) == drafted[1:2]


def test_advancing_with_depth_zero_says_nothing_until_more_is_wanted() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 6)
    made.open("s", PROMPT, GREEDY, depth=0)
    made.advance("s", len(PROMPT), truth[:1], depth=0)
    silent = drain(made)
    made.advance("s", len(PROMPT) + 1, truth[1:2], depth=4)
    assert (silent, only(made)) == ([], truth[2:6])


def test_advancing_before_the_prompt_is_prefilled_is_right() -> None:
    made, _ = drafter(budget=7)
    truth = continuation(PROMPT, 4)
    made.open("s", PROMPT, GREEDY, depth=0)
    made.step()
    made.advance("s", len(PROMPT), truth[:1], depth=3)
    assert only(made) == truth[1:4]


def test_advancing_in_the_middle_of_drafting_is_right() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 8)
    made.open("s", PROMPT, GREEDY, depth=6)
    made.step()
    made.step()
    made.advance("s", len(PROMPT), truth[:1], depth=4)
    assert only(made) == truth[1:5]


def test_advancing_by_nothing_drafts_the_same_again() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=3)
    drafted = only(made)
    made.advance("s", len(PROMPT), (), depth=3)
    assert only(made) == drafted


def test_advancing_by_nothing_drafts_from_a_prefilled_prompt() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=0)
    drain(made)
    made.advance("s", len(PROMPT), (), depth=3)
    assert only(made) == continuation(PROMPT, 3)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 5), st.integers(0, 3)), max_size=6))
def test_any_history_of_acceptance_drafts_like_a_fresh_open(rounds: list[tuple[int, bool, int, int]]) -> None:
    made, _ = drafter(budget=5)
    made.open("s", PROMPT[:6], SEEDED, depth=4)
    tokens, drafted = list(PROMPT[:6]), ()
    for agreed, right, depth, steps in rounds:
        for _ in range(steps):
            drafted = next((answer.tokens for answer in made.step()), drafted)
        new = [*drafted[:agreed], 3 if right else 4]
        made.advance("s", len(tokens), new, depth)
        tokens, drafted = tokens + new, ()
    made.advance("s", len(tokens), [5], depth=4)
    fresh, _ = drafter()
    fresh.open("s", [*tokens, 5], SEEDED, depth=4)
    assert drain(made)[-1] == drain(fresh)[-1]


# Ahead, for a caller that keeps what it gets.


def streaming(made: Drafter, tokens: Sequence[int] = PROMPT, depth: int = 3, ahead: int = 4, **options: Any) -> None:
    made.open("s", tokens, options.pop("params", GREEDY), depth, ahead=ahead, streaming=True, **options)


def said(answers: Sequence[Drafted]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(answer.base, answer.offset, answer.tokens) for answer in answers]


def test_what_is_owed_comes_at_once_and_what_is_ahead_as_it_is_drafted() -> None:
    made, _ = drafter()
    truth, n = continuation(PROMPT, 7), len(PROMPT)
    streaming(made, depth=3, ahead=4)
    assert said(drain(made)) == [(n, 0, truth[:3])] + [(n, at, truth[at : at + 1]) for at in range(3, 7)]


def test_nothing_is_drafted_beyond_the_credit() -> None:
    made, _ = drafter()
    streaming(made, depth=3, ahead=4)
    drain(made)
    assert (made.drafted_tokens, made.has_work) == (7, False)


def test_full_agreement_says_only_what_is_new() -> None:
    made, _ = drafter()
    truth, n = continuation(PROMPT, 11), len(PROMPT)
    streaming(made, depth=3, ahead=4)
    drain(made)
    made.advance("s", n, truth[:4], depth=3)
    assert said(drain(made)) == [(n + 4, at, truth[4 + at : 5 + at]) for at in range(3, 7)]


def test_agreement_keeps_the_keys_of_what_is_ahead() -> None:
    made, batches = drafter()
    truth = continuation(PROMPT, 11)
    streaming(made, depth=3, ahead=4)
    drain(made)
    before = len(batches)
    made.advance("s", len(PROMPT), truth[:4], depth=3)
    drain(made)
    assert batches[before:] == [[1]] * 4


def test_disagreement_drafts_again_from_the_agreed_text() -> None:
    made, _ = drafter()
    truth, n = continuation(PROMPT, 2), len(PROMPT)
    streaming(made, depth=3, ahead=4)
    drain(made)
    made.advance("s", n, (truth[0], wrong(truth[1])), depth=3)
    answers = drain(made)
    fresh = continuation((*PROMPT, truth[0], wrong(truth[1])), 6)
    assert [token for answer in answers for token in answer.tokens] == list(fresh)
    assert (said(answers)[0], made.rolled_back_tokens) == ((n + 2, 0, fresh[:3]), 6)


def test_credit_shrinks_where_guesses_fail_and_grows_where_they_hold() -> None:
    made, _ = drafter()
    streaming(made, depth=1, ahead=8)
    tokens, ahead = list(PROMPT), []
    for right in (*[False] * 6, *[True] * 4):
        drain(made)
        guess = list(made._drafts["s"].drafted)
        ahead.append(len(guess) - 1)
        new = guess[:1] if right else [wrong(guess[0])]
        made.advance("s", len(tokens), new, depth=1)
        tokens += new
    assert ahead == [8, 6, 4, 3, 2, 1, 0, 1, 3, 7]


def test_depth_zero_drafts_nothing_more() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 1)
    streaming(made, depth=3, ahead=4)
    made.step()
    before = made.drafted_tokens
    made.advance("s", len(PROMPT), truth, depth=0)
    # The opening is answered, as of a prompt that is computed.
    assert (drain(made), made.drafted_tokens) == ([Drafted("s", len(PROMPT) + 1)], before)


def test_drafting_resumes_with_a_depth() -> None:
    made, _ = drafter()
    truth = continuation(PROMPT, 6)
    streaming(made, depth=3, ahead=0)
    drain(made)
    made.advance("s", len(PROMPT), truth[:1], depth=0)
    drain(made)
    made.advance("s", len(PROMPT) + 1, truth[1:2], depth=4)
    answers = drain(made)
    # One of the first three was said before.
    assert said(answers) == [(len(PROMPT) + 2, 1, truth[3:6])]


def test_a_sequence_that_is_not_wanted_is_brought_up_to_date_in_pieces() -> None:
    made, batches = drafter()
    streaming(made, depth=0)
    drain(made)
    before, tokens = len(batches), list(PROMPT)
    for token in tiny.prompt(40, seed=5):
        made.advance("s", len(tokens), (token,), depth=0)
        tokens.append(token)
        drain(made)
    assert [len(batch) for batch in batches[before:]] == [1]


def test_a_prefilled_prompt_is_announced() -> None:
    made, _ = drafter()
    streaming(made, depth=0)
    assert drain(made) == [Drafted("s", len(PROMPT))]


def test_the_end_of_the_context_is_announced() -> None:
    made, _ = drafter()
    streaming(made, tiny.prompt(510), depth=4)
    (answer,) = drain(made)
    assert (len(answer.tokens), answer.final) == (2, True)


@pytest.mark.parametrize(("depth", "ahead", "drafted"), [(99, 0, 16), (1, 9999, 65)])
def test_no_more_is_drafted_than_the_protocol_allows(depth: int, ahead: int, drafted: int) -> None:
    made, _ = drafter()
    streaming(made, depth=depth, ahead=ahead)
    drain(made)
    assert made.drafted_tokens == drafted


def test_owed_tokens_and_those_ahead_share_a_forward_pass() -> None:
    made, batches = drafter()
    streaming(made, PROMPT, depth=1, ahead=6)
    made.step()
    made.open("other", PROMPT[:5], GREEDY, depth=3)
    before = len(batches)
    made.step()
    made.step()
    assert batches[before:] == [[5, 1], [1, 1]]


def test_a_prompt_is_prefilled_in_small_pieces_while_others_draft() -> None:
    runner = CountingRunner(tiny.ours(MODEL).model)
    made = Drafter(
        runner, tiny.kv_for(runner), max_batched_tokens=64, max_model_len=CONTEXT, max_prefill_while_drafting=16
    )
    streaming(made, PROMPT, depth=1, ahead=8)
    made.step()
    made.open("long", tiny.prompt(60, seed=4), GREEDY, depth=0)
    made.step()
    assert runner.batches[-1] == [1, 16]


def test_no_room_for_what_is_ahead_is_not_busy() -> None:
    made, _ = drafter(capacity=2 * (17 + 64) + 2)
    streaming(made, PROMPT, depth=4, ahead=64)
    made.open("other", PROMPT, SEEDED, depth=4)
    answers = drain(made)
    assert [answer.failure for answer in answers] == [None] * len(answers)


def test_a_sequence_nobody_wants_drafted_gives_its_room_away() -> None:
    made, _ = drafter(capacity=120)
    streaming(made, PROMPT, depth=0)
    drain(made)
    made.open("other", tiny.prompt(30, seed=3), GREEDY, depth=2)
    answers = drain(made)
    assert [(answer.key, answer.failure) for answer in answers] == [("other", None)]


def test_a_sequence_in_the_step_s_own_batch_keeps_its_room() -> None:
    """Its window points at it."""
    made, _ = drafter(capacity=17 + 64 + 60)
    streaming(made, PROMPT, depth=0)
    made.open("other", tiny.prompt(40, seed=3), GREEDY, depth=2)
    failures = {answer.key: answer.failure for answer in made.step()}
    assert failures == {"s": None, "other": DraftFailureReason.BUSY}


def test_a_sequence_that_gave_its_room_away_drafts_again_when_wanted() -> None:
    made, _ = drafter(capacity=120)
    streaming(made, PROMPT, depth=0, ahead=0)
    drain(made)
    made.open("other", tiny.prompt(30, seed=3), GREEDY, depth=2)
    drain(made)
    made.close("other")
    truth = continuation(PROMPT, 4)
    made.advance("s", len(PROMPT), truth[:1], depth=3)
    assert only(made) == truth[1:4]


def test_too_many_sequences_are_busy() -> None:
    runner = tiny.ours(MODEL)
    made = Drafter(runner, tiny.kv_for(runner), max_batched_tokens=64, max_model_len=CONTEXT, max_sequences=1)
    made.open("a", PROMPT, GREEDY, depth=0)
    made.open("b", PROMPT, GREEDY, depth=0)
    assert made.step() == [Drafted("b", len(PROMPT), failure=DraftFailureReason.BUSY)]


def test_rejection_sampling_has_a_row_for_every_token() -> None:
    made, _ = drafter()
    streaming(made, params=SEEDED, depth=3, ahead=2, rejection=True)
    answers = drain(made)
    rows = [(token, row) for answer in answers for token, row in zip(answer.tokens, answer.probs, strict=True)]
    assert (len(rows), all(token in row.ids for token, row in rows)) == (5, True)


def test_both_ways_of_drawing_share_a_forward_pass() -> None:
    made, batches = drafter()
    made.open("coupled", PROMPT, SEEDED, depth=2)
    made.open("rejection", PROMPT, SEEDED, depth=2, rejection=True)
    answers = {answer.key: answer for answer in drain(made)}
    assert (answers["coupled"].tokens, len(answers["rejection"].probs)) == (continuation(PROMPT, 2, SEEDED), 2)
    assert batches == [[17, 17], [1, 1]]


# Failures.


def test_a_base_beyond_what_is_known_is_a_mismatch() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=0)
    made.advance("s", len(PROMPT) + 1, (5,), depth=2)
    assert drain(made) == [Drafted("s", len(PROMPT) + 1, failure=DraftFailureReason.BASE_MISMATCH)]


def test_a_base_in_the_past_is_a_mismatch() -> None:
    """An agreed length occurs once: a second time it is a duplicate, or of another history."""
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=3)
    drain(made)
    made.advance("s", 9, (8, 7), depth=3)
    assert drain(made) == [Drafted("s", 9, failure=DraftFailureReason.BASE_MISMATCH)]


def test_a_mismatch_forgets_the_sequence() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=3)
    drain(made)
    made.advance("s", 9, (8, 7), depth=3)
    assert (made.num_sequences, made.kv.usage().in_use) == (0, 0)


def test_an_unknown_key_is_said_to_be_unknown() -> None:
    made, _ = drafter()
    made.advance("s", 3, (5,), depth=2)
    assert drain(made) == [Drafted("s", 3, failure=DraftFailureReason.UNKNOWN_SEQUENCE)]


def test_a_closed_key_is_unknown() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=1)
    made.close("s")
    made.advance("s", len(PROMPT), (5,), depth=1)
    assert [answer.failure for answer in drain(made)] == [DraftFailureReason.UNKNOWN_SEQUENCE]


def test_closing_an_unknown_key_is_nothing() -> None:
    made, _ = drafter()
    made.close("s")
    assert made.has_work is False


@pytest.mark.parametrize("tokens", [(), (5, tiny.VOCAB), (-1,)], ids=["none", "too large", "negative"])
def test_a_history_that_makes_no_sense_is_a_failure(tokens: tuple[int, ...]) -> None:
    made, _ = drafter()
    made.open("s", tokens, GREEDY, depth=2)
    assert (drain(made), made.num_sequences) == (
        [Drafted("s", len(tokens), failure=DraftFailureReason.UNSUPPORTED)],
        0,
    )


@pytest.mark.parametrize("token", [tiny.VOCAB, -1])
def test_an_advance_that_makes_no_sense_is_a_failure_and_closes(token: int) -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=0)
    drain(made)
    made.advance("s", len(PROMPT), (token,), depth=2)
    assert (drain(made), made.num_sequences, made.kv.usage().in_use) == (
        [Drafted("s", len(PROMPT), failure=DraftFailureReason.UNSUPPORTED)],
        0,
        0,
    )


def test_no_room_for_another_sequence_is_busy() -> None:
    made, _ = drafter(capacity=100)
    made.open("a", PROMPT, GREEDY, depth=2)
    made.open("b", tiny.prompt(30), GREEDY, depth=2)
    answers = {answer.key: answer.failure for answer in drain(made)}
    assert answers == {"a": None, "b": DraftFailureReason.BUSY}


def test_room_is_used_to_the_last_token_before_it_is_busy() -> None:
    made, _ = drafter(capacity=81)
    made.open("a", PROMPT, GREEDY, depth=2)
    drain(made)
    made.advance("a", len(PROMPT), tiny.prompt(62), depth=2)
    assert [answer.failure for answer in drain(made)] == [None]


def test_a_busy_drafter_forgets_the_sequence() -> None:
    made, _ = drafter(capacity=50)
    made.open("a", PROMPT, GREEDY, depth=2)
    drain(made)
    assert (made.num_sequences, made.kv.usage().in_use) == (0, 0)


def test_no_room_to_grow_is_busy_and_frees_everything() -> None:
    made, _ = drafter(capacity=90)
    made.open("a", PROMPT, GREEDY, depth=2)
    drain(made)
    made.advance("a", len(PROMPT), tiny.prompt(70), depth=2)
    answers = drain(made)
    assert [answer.failure for answer in answers] == [DraftFailureReason.BUSY]
    assert (made.num_sequences, made.kv.usage().in_use) == (0, 0)


@pytest.mark.parametrize(("length", "candidates"), [(509, 3), (510, 2), (511, 1), (512, 0), (600, 0)])
def test_the_end_of_the_context_ends_the_candidates(length: int, candidates: int) -> None:
    made, _ = drafter()
    made.open("s", tiny.prompt(length), GREEDY, depth=4)
    assert len(only(made)) == candidates


def test_advancing_past_the_end_of_the_context_gives_no_candidates() -> None:
    made, _ = drafter()
    made.open("s", tiny.prompt(511), GREEDY, depth=4)
    drain(made)
    made.advance("s", 511, tiny.prompt(4), depth=4)
    assert drain(made) == [Drafted("s", 515, ())]


def test_a_history_beyond_the_context_is_not_prefilled() -> None:
    made, batches = drafter()
    made.open("s", tiny.prompt(600), GREEDY, depth=0)
    assert (drain(made), batches) == ([], [])


# Several at once, and again.


def test_sequences_drafted_together_equal_those_drafted_alone() -> None:
    prompts = {name: tiny.prompt(n, seed=n) for name, n in (("a", 3), ("b", 17), ("c", 60))}
    alone = {}
    for name, tokens in prompts.items():
        made, _ = drafter()
        made.open(name, tokens, SEEDED, depth=5)
        alone[name] = only(made)
    together, _ = drafter()
    for name, tokens in prompts.items():
        together.open(name, tokens, SEEDED, depth=5)
    assert {answer.key: answer.tokens for answer in drain(together)} == alone


def test_running_drafts_share_a_forward_pass() -> None:
    made, batches = drafter()
    made.open("a", PROMPT[:5], GREEDY, depth=2)
    made.open("b", PROMPT[:7], GREEDY, depth=2)
    drain(made)
    assert batches == [[5, 7], [1, 1]]


def test_closing_one_leaves_the_other() -> None:
    made, _ = drafter()
    made.open("a", PROMPT, GREEDY, depth=4)
    made.open("b", PROMPT[:9], GREEDY, depth=4)
    made.step()
    made.close("a")
    assert drain(made) == [Drafted("b", 9, continuation(PROMPT[:9], 4))]


def test_closing_keeps_keys_and_values_as_cache() -> None:
    made, _ = drafter()
    made.open("a", PROMPT, GREEDY, depth=0)
    drain(made)
    made.close("a")
    usage = made.kv.usage()
    assert (usage.in_use, usage.cached) == (0, len(PROMPT))


def test_the_next_turn_prefills_only_what_is_new() -> None:
    made, batches = drafter()
    made.open("a", PROMPT, GREEDY, depth=4)
    drafted = only(made)
    made.close("a")
    before = len(batches)
    made.open("b", (*PROMPT, *drafted, *tiny.prompt(5)), GREEDY, depth=0)
    drain(made)
    assert batches[before:] == [[len(drafted) + 5]]


def test_the_next_turn_takes_the_former_ones_place() -> None:
    made, _ = drafter()
    made.open("a", PROMPT, GREEDY, depth=4)
    drain(made)
    made.close("a")
    made.open("b", (*PROMPT, *tiny.prompt(5)), GREEDY, depth=0)
    drain(made)
    assert made.kv.usage().cached == 0


def test_opening_again_begins_anew() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, GREEDY, depth=4)
    made.step()
    made.open("s", PROMPT[:8], GREEDY, depth=3)
    assert drain(made) == [Drafted("s", 8, continuation(PROMPT[:8], 3))]


def test_drafted_tokens_are_counted() -> None:
    made, _ = drafter()
    made.open("a", PROMPT, GREEDY, depth=4)
    made.open("b", PROMPT, GREEDY, depth=3)
    drain(made)
    assert made.drafted_tokens == 7


# Penalties.


PENALIZED = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0, min_tokens=9, max_tokens=64)


def test_a_reopened_sequence_tells_prompt_from_output() -> None:
    params = {"presence_penalty": 2.0, "frequency_penalty": 1.0}
    truth = tiny.run(tiny.engine_for(MODEL), tiny.request(PROMPT, **params))["r"]
    made, _ = drafter()
    made.open("s", (*PROMPT, *truth[:10]), PENALIZED, depth=8, prompt_length=len(PROMPT))
    assert only(made) == tuple(truth[10:18])


def test_rejected_candidates_leave_no_penalty_behind() -> None:
    made, _ = drafter()
    made.open("s", PROMPT, PENALIZED, depth=6)
    guessed = only(made)
    agreed = (guessed[0], wrong(guessed[1]))
    made.advance("s", len(PROMPT), agreed, depth=4)
    fresh, _ = drafter()
    fresh.open("s", (*PROMPT, *agreed), PENALIZED, depth=4, prompt_length=len(PROMPT))
    assert only(made) == only(fresh)


# A part of the vocabulary.


class WholeRunner(ReducedVocabRunner):
    """Logits of every token of the target's, -inf for those the draft cannot draw."""

    @property
    def columns(self) -> None:  # type: ignore[override]
        return None

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        return super().columns.whole(super().run(windows))


def drafted_over_a_part(kind: type[ReducedVocabRunner], params: SamplingParams, rejection: bool) -> list[Drafted]:
    kept = torch.arange(0, tiny.VOCAB, 3)
    model = tiny.ours(tiny.tiny_llama(vocab_size=len(kept)))
    runner = kind(model, kept, torch.arange(tiny.VOCAB) // 3)
    made = Drafter(runner, tiny.kv_for(runner), max_batched_tokens=64, max_model_len=CONTEXT)
    for n in range(4):
        made.open(n, PROMPT[n:], params, depth=8, rejection=rejection)
    return drain(made)


@pytest.mark.parametrize("rejection", [False, True], ids=["coupled", "rejection"])
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=11),
        SEEDED,
        SamplingParams(seed=11, top_k=9, min_p=0.01),
        SamplingParams(seed=11, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 4.0, 4: 9.0}),
    ],
    ids=["greedy", "seeded", "top-p", "top-k and min-p", "penalties and bias"],
)
def test_a_part_of_the_vocabulary_drafts_what_the_whole_would(params: SamplingParams, rejection: bool) -> None:
    found = drafted_over_a_part(ReducedVocabRunner, params, rejection)
    assert found == drafted_over_a_part(WholeRunner, params, rejection)


def test_a_draft_over_a_part_of_the_vocabulary_says_only_what_it_keeps() -> None:
    found = drafted_over_a_part(ReducedVocabRunner, SamplingParams(seed=11, temperature=3.0), rejection=False)
    assert {token % 3 for answer in found for token in answer.tokens} == {0}


def test_a_draft_over_a_part_of_the_vocabulary_is_no_target() -> None:
    kept = torch.arange(0, tiny.VOCAB, 3)
    model = tiny.tiny_llama(vocab_size=len(kept))
    runner = ReducedVocabRunner(tiny.ours(model), kept, torch.arange(tiny.VOCAB) // 3)
    with pytest.raises(ModelError, match="is no target"):
        tiny.engine_for(model, runner=runner)
