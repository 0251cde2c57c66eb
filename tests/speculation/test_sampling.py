"""Processing of rows, from history to tokens: against Transformers' processors, and row by row against itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from paceline.errors import InvalidRequest
from paceline.speculation import sampling
from paceline.speculation.sampling import Columns, Rows
from paceline.types import SamplingParams

VOCAB = 23
PARAMS = SamplingParams(
    temperature=0.9,
    seed=3,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.7,
    logit_bias={4: 2.0, 9: -100.0},
    min_tokens=6,
    stop_token_ids=(1, 2),
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def one_by_one(logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], count: int) -> torch.Tensor:
    """Each row by itself, with all of its history in `tokens`."""
    rows = []
    for n in range(count):
        history = [*prompt, *output[: len(output) - count + 1 + n]]
        rows.append(sampling.adjust(logits[n : n + 1], Rows(PARAMS, len(prompt), history)))
    return torch.cat(rows)


@settings(max_examples=60)
@given(prompt=tokens.filter(bool), agreed=tokens, candidates=tokens)
def test_each_row_of_a_window_has_the_history_of_plain_decoding(
    prompt: list[int], agreed: list[int], candidates: list[int]
) -> None:
    logits = noise(len(candidates) + 1)
    window = Rows(PARAMS, len(prompt), [*prompt, *agreed], candidates, len(candidates) + 1)
    expected = one_by_one(logits, prompt, [*agreed, *candidates], len(candidates) + 1)
    assert torch.equal(sampling.adjust(logits, window), expected)


@settings(max_examples=60)
@given(prompt=tokens.filter(bool), agreed=tokens, drafted=tokens)
def test_a_drafters_row_has_the_history_of_the_targets(
    prompt: list[int], agreed: list[int], drafted: list[int]
) -> None:
    logits = noise(1)
    split = sampling.adjust(logits, Rows(PARAMS, len(prompt), [*prompt, *agreed], drafted))
    assert torch.equal(split, sampling.adjust(logits, Rows(PARAMS, len(prompt), [*prompt, *agreed, *drafted])))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, history = noise(1), [3, 5, 5, 7, 3]
    found = sampling.adjust(logits, Rows(SamplingParams(repetition_penalty=penalty), 3, history))
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits.clone()))


def test_presence_and_frequency_count_the_output_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = sampling.adjust(torch.zeros(1, VOCAB), Rows(params, 2, [8, 9, 9, 10, 10, 10]))
    expected = torch.zeros(1, VOCAB)
    expected[0, 9], expected[0, 10] = -0.75, -1.25
    assert torch.equal(found, expected)


def test_ends_are_masked_row_by_row_until_there_are_min_tokens() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(1, 2, VOCAB + 5))
    found = sampling.adjust(torch.zeros(4, VOCAB), Rows(params, 2, [8, 9, 9], [4, 5, 6], 4))
    assert (found == -torch.inf).nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


def test_a_biased_repetition_is_penalized_after_the_bias() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias={4: 6.0})
    found = sampling.adjust(torch.full((1, VOCAB), -2.0), Rows(params, 1, [4]))
    assert found[0, 4] == 2.0  # (-2 + 6) / 2


def test_the_model_keeps_its_logits() -> None:
    logits = noise(2)
    before = logits.clone()
    sampling.draw(logits, [Rows(PARAMS, 1, [3], [4], 2)])
    assert torch.equal(logits, before)


def test_without_parameters_the_logits_pass_as_they_are() -> None:
    logits = noise(1)
    assert sampling.adjust(logits, Rows(SamplingParams(seed=1, top_p=0.5), 1, [3])) is logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_draws_what_each_member_draws_alone(dtype: torch.dtype) -> None:
    logits = noise(8).to(dtype)
    greedy = SamplingParams(temperature=0)
    batch = [
        Rows(greedy, 1, [3], [4, 5], 3),
        Rows(PARAMS, 2, [3, 4, 5], [6], 2),
        Rows(SamplingParams(seed=4), 1, [3]),
        Rows(SamplingParams(temperature=0, repetition_penalty=2.0), 1, [3, 7]),
        Rows(greedy, 1, [3]),
    ]
    alone, start = [], 0
    for rows in batch:
        alone += sampling.draw(logits[start : start + rows.count], [rows])
        start += rows.count
    assert sampling.draw(logits, batch) == alone


def test_positions_are_those_of_the_tokens_drawn() -> None:
    assert list(Rows(PARAMS, 2, [1, 2, 3], [4, 5], 3).positions) == [3, 4, 5]
    assert list(Rows(PARAMS, 2, [1, 2, 3], [4, 5]).positions) == [5]


def test_the_rank_of_the_likeliest_is_one_and_the_top_is_sorted() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    (found,) = sampling.logprobs(logits, [2], 2)
    expected = logits.log_softmax(-1)[0]
    assert (found.token_id, found.rank, [token for token, _ in found.top]) == (2, 2, [1, 2])
    assert found.logprob == pytest.approx(expected[2].item())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "0"),
        ("logit_bias", {5: 101}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", "5"),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("n", 129),
    ],
)
def test_a_wrong_parameter_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_parameters_with_a_bias_compare_and_hash_by_value() -> None:
    first, second = SamplingParams(logit_bias={5: 1, 3: 2.0}), SamplingParams(logit_bias=((3, 2), (5, 1.0)))
    assert (first, hash(first), first.bias) == (second, hash(second), {3: 2.0, 5: 1.0})


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(temperature=0), SamplingParams(seed=9, top_p=0.8)])
@pytest.mark.parametrize("right", range(4))
def test_a_run_is_drawn_up_to_the_first_refused_candidate(params: SamplingParams, right: int) -> None:
    logits, candidates = noise(4), [0, 0, 0]
    for place in range(3):  # what a row draws depends on the candidates above it
        (drawn,) = sampling.draw(logits, [Rows(params, 1, [3], candidates, 4)])
        candidates[place] = drawn[place] if place < right else (drawn[place] + 1) % VOCAB
    (whole,) = sampling.draw(logits, [Rows(params, 1, [3], candidates, 4)])
    assert sampling.accepted_run(whole, candidates) == (whole[: right + 1], right)


def test_draws_of_a_mixed_batch_are_those_of_each_member_alone() -> None:
    logits = noise(9)
    batch = [
        Rows(SamplingParams(seed=1), 1, [3], [4, 5], 3),
        Rows(SamplingParams(temperature=0), 1, [3], [int(logits[3].argmax())], 2),
        Rows(PARAMS, 1, [3]),
        Rows(SamplingParams(seed=2, top_k=3), 1, [3], [7, 8], 3),
    ]
    alone, start = [], 0
    for rows in batch:
        alone += sampling.draw(logits[start : start + rows.count], [rows])
        start += rows.count
    assert sampling.draw(logits, batch) == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(seed=9),
        SamplingParams(seed=9, top_p=0.8),
        SamplingParams(seed=9, top_k=4),
        SamplingParams(seed=9, top_k=VOCAB - 1),
        SamplingParams(seed=9, min_p=0.1),
        PARAMS,
    ],
    ids=["greedy", "seeded", "top-p", "top-k", "a top-k of more than there are", "min-p", "adjusted"],
)
def test_columns_draw_what_the_whole_vocabulary_draws(params: SamplingParams, dtype: torch.dtype) -> None:
    columns = Columns(torch.tensor([0, 1, 2, 4, 7, 8, 9, 15, 16, 20]), VOCAB)
    logits = noise(200)[:, :10].to(dtype)
    batch = [Rows(params, 2, [3, 4, 5][: 2 + n % 2], [7] * (n % 5)) for n in range(200)]
    assert sampling.draw(logits, batch, columns) == sampling.draw(columns.whole(logits), batch)


def test_who_is_adjusted_changes_nothing_for_who_is_not() -> None:
    columns, logits = Columns(torch.tensor([1, 4, 9]), VOCAB), noise(2)[:, :3]
    plain, adjusted = Rows(SamplingParams(seed=4), 1, [3]), Rows(PARAMS, 1, [3])
    together = sampling.draw(logits, [plain, adjusted], columns)
    assert together == [
        sampling.draw(logits[n : n + 1], [rows], columns)[0] for n, rows in enumerate([plain, adjusted])
    ]


def test_a_token_without_a_column_is_impossible() -> None:
    whole = Columns(torch.tensor([1, 3]), 5).whole(torch.tensor([[2.0, 4.0]]))
    assert whole.tolist() == [[-torch.inf, 2.0, -torch.inf, 4.0, -torch.inf]]
