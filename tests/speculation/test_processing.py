"""A batch of rows with mixed parameters, processed and drawn together: what each row says alone, one step at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.speculation import coupling, processing
from paceline.types import SamplingParams

VOCAB = 3000
Draw = Callable[[torch.Tensor, list[SamplingParams], range], torch.Tensor]


def one_by_one(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The filters as they are defined, over one sorted row."""
    scores = row.float() / params.temperature
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.sort(descending=True).values[params.top_k - 1], -torch.inf)
    if params.top_p < 1.0:
        ordered = scores.sort(descending=True).values
        mass = ordered.double().softmax(-1).cumsum(-1)
        edge = ordered[int((mass < params.top_p).sum().clamp(max=len(scores) - 1))]
        scores = scores.masked_fill(scores < edge, -torch.inf)
    if params.min_p > 0.0:
        scores = scores.masked_fill(scores < scores.max() + torch.tensor(params.min_p).log(), -torch.inf)
    return scores


def drawn_alone(row: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The rule as it is defined: noise for the whole vocabulary, then the best."""
    if params.greedy:
        return int(row.argmax())
    assert params.seed is not None
    return int((one_by_one(row, params) + coupling.gumbel(params.seed, [position], len(row))[0]).argmax())


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 40, 500, 2000, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def logits_of(spreads: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(len(spreads), VOCAB, generator=torch.Generator().manual_seed(len(spreads)))
    return (rows * torch.tensor(spreads)[:, None]).to(dtype)


@pytest.mark.parametrize("draw", [coupling.draw_rows, coupling.columns_by_definition], ids=["kernel", "torch"])
@given(rows=st.lists(st.tuples(PARAMS, st.sampled_from([0.1, 1.0, 3.0, 9.0])), min_size=1, max_size=9))
def test_a_mixed_batch_draws_what_the_definition_draws_row_by_row(
    draw: Draw, rows: list[tuple[SamplingParams, float]]
) -> None:
    params, logits = [p for p, _ in rows], logits_of([spread for _, spread in rows])
    alone = [drawn_alone(row, p, n) for n, (row, p) in enumerate(zip(logits, params, strict=True))]
    assert draw(logits, params, range(len(rows))).tolist() == alone


@given(st.lists(st.tuples(PARAMS, st.sampled_from([0.1, 1.0, 3.0, 9.0])), min_size=1, max_size=9))
def test_a_mixed_batch_keeps_what_the_definition_keeps_row_by_row(rows: list[tuple[SamplingParams, float]]) -> None:
    rows = [(p, spread) for p, spread in rows if not p.greedy]
    params, logits = [p for p, _ in rows], logits_of([spread for _, spread in rows])
    alone = [one_by_one(row, p) for row, p in zip(logits, params, strict=True)]
    assert torch.equal(processing.process_logits(logits, params), torch.stack(alone) if alone else logits)


@pytest.mark.parametrize("width", [*processing.TIERS, *(tier - 1 for tier in processing.TIERS)])
def test_ties_across_the_end_of_a_tier_stay_in(width: int) -> None:
    row = torch.zeros(1, VOCAB)
    row[0, ::2] = 1.0  # 1500 likeliest tokens
    assert int(processing.process_logits(row, SamplingParams(top_k=width)).isfinite().sum()) == VOCAB // 2


def test_half_precision_draws_what_its_float32_values_draw() -> None:
    logits = logits_of([3.0, 1.0], torch.bfloat16)
    params = [SamplingParams(seed=1, top_p=0.9), SamplingParams(temperature=0)]
    whole = coupling.draw_rows(logits.float(), params, [4, 5])
    assert torch.equal(coupling.draw_rows(logits, params, [4, 5]), whole)


def test_every_row_survives_once() -> None:
    params = [SamplingParams(seed=1, top_p=top_p) for top_p in (1.0, 0.9, 0.3, 0.999, 1.0)]
    parts = list(processing.survivors(logits_of([1.0, 9.0, 3.0, 0.1, 2.0]), params))
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution_still_ends(broken: float) -> None:
    logits = logits_of([0.1])
    logits[0, 7] = broken
    assert len(coupling.draw(logits, SamplingParams(seed=1, top_p=0.9, min_p=0.1), [3])) == 1


def test_the_lazy_way_leaves_wide_nuclei_unfiltered() -> None:
    parts = list(processing.survivors(logits_of([0.1, 9.0]), [SamplingParams(seed=1, top_p=0.9)] * 2, lazy=True))
    assert [type(part) for part in parts] == [processing.Survivors, processing.Unfiltered]
