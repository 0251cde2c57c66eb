"""What a device draws, against what the coupling defines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton, which also interprets its kernels on a CPU, is not installed")

from paceline.engine.gpu import draws
from paceline.engine.gpu.inputs import drawn_on_device, words_of
from paceline.speculation import coupling
from paceline.speculation.sampling import Rows
from paceline.types import Grammar, SamplingParams

VOCAB, CHUNK, BLOCK = 1000, 256, 128
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "all tokens": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=5),
    "top_k 1": SamplingParams(top_k=1),
    "top_k beyond the vocabulary": SamplingParams(top_k=5000),
    "top_p": SamplingParams(temperature=1.3, top_p=0.5),
    "top_p of nearly all": SamplingParams(top_p=0.999),
    "min_p": SamplingParams(min_p=0.1),
    "min_p and top_p": SamplingParams(min_p=0.02, top_p=0.8),
}


def drawn(
    logits: torch.Tensor,
    params: list[SamplingParams],
    positions: range,
    names: torch.Tensor | None = None,
    allowed: dict[int, torch.Tensor] | None = None,
) -> list[int]:
    """`allowed` are the masks, bool [vocab], of rows that have one."""
    rows, vocab = logits.shape
    chunks = -(-vocab // CHUNK)
    starts = [coupling.signed(start) for start in coupling.counters(params, positions)]
    counters = torch.tensor(starts, dtype=torch.int64)
    temperatures = torch.tensor([each.temperature for each in params])
    best = torch.empty(rows, chunks)
    tokens = torch.full((rows,), -1)
    masks, masked = masks_of(allowed or {}, rows)
    draws.draw_chunks[(chunks, rows)](
        logits,
        logits.stride(0),
        vocab,
        masks,
        masks.stride(0),
        masked,
        names,
        counters,
        temperatures,
        best,
        NAMED=names is not None,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
    )
    draws.draw_rows[(rows,)](
        logits, logits.stride(0), vocab, masks, masks.stride(0), masked, names, counters, temperatures,
        torch.tensor([each.min_p for each in params]).log(),
        torch.tensor([each.top_p for each in params], dtype=torch.float64),
        torch.tensor([each.top_k for each in params], dtype=torch.int32),
        best, chunks, tokens, NAMED=names is not None, CHUNKS=1 << (chunks - 1).bit_length(), CHUNK=CHUNK, BLOCK=BLOCK,
    )  # fmt: skip
    return tokens.tolist()


def masks_of(allowed: dict[int, torch.Tensor], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words, and which rows have any; those of others are not to be looked at."""
    bits = torch.zeros(rows, words_of(VOCAB) * 32, dtype=torch.bool)
    for row, its in allowed.items():
        bits[row, : len(its)] = its
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(packed), torch.tensor([row in allowed for row in range(rows)], dtype=torch.int32)


def unmasked(rows: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    masks, masked = masks_of({}, rows)
    return masks, masks.stride(0), masked


def some_logits(rows: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_the_coupling_defines(kind: str) -> None:
    params = [replace(KINDS[kind], seed=seed) for seed in range(6)]
    logits, positions = some_logits(6), range(40, 46)
    expected = coupling.columns_by_definition(logits, params, positions).tolist()
    assert drawn(logits, params, positions) == expected


def test_rows_of_all_kinds_together() -> None:
    params = [replace(each, seed=seed) for seed, each in enumerate(KINDS.values())]
    logits, positions = some_logits(len(params), scale=1.0), range(len(params))
    expected = coupling.columns_by_definition(logits, params, positions).tolist()
    assert drawn(logits, params, positions) == expected


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0015])
def test_masked_rows_draw_as_if_the_others_had_no_probability(share: float) -> None:
    params = [replace(each, seed=seed) for seed, each in enumerate(KINDS.values())] * 2
    logits, positions = some_logits(len(params), scale=1.0), range(len(params))
    chance = torch.Generator().manual_seed(1)
    allowed = {row: torch.rand(VOCAB, generator=chance) < share for row in range(0, len(params), 2)}
    for its in allowed.values():
        its[-1] = True
    masked = logits.clone()
    for row, its in allowed.items():
        masked[row, ~its] = -torch.inf
    expected = coupling.columns_by_definition(masked, params, positions).tolist()
    assert drawn(logits, params, positions, allowed=allowed) == expected


def test_a_row_whose_mask_leaves_nothing_ends_with_some_token() -> None:
    params = [replace(each, seed=1) for each in KINDS.values()]
    nothing = {row: torch.zeros(VOCAB, dtype=torch.bool) for row in range(len(params))}
    found = drawn(some_logits(len(params)), params, range(len(params)), allowed=nothing)
    assert all(0 <= token < VOCAB for token in found)


def test_columns_draw_with_the_noise_of_the_tokens_they_stand_for() -> None:
    params, logits, positions = [replace(KINDS["top_p"], seed=seed) for seed in range(8)], some_logits(8), range(8)
    names = torch.randperm(50 * VOCAB, generator=torch.Generator().manual_seed(0))[:VOCAB].sort().values
    expected = coupling.columns_by_definition(logits, params, positions, names).tolist()
    assert drawn(logits, params, positions, names.int()) == expected


def test_totals_in_float32_are_far_nearer_than_chunks_are_looked_through_for() -> None:
    logits, params = some_logits(32), [SamplingParams(seed=seed) for seed in range(32)]
    counters = torch.tensor([coupling.signed(start) for start in coupling.counters(params, range(32))])
    best, names = torch.empty(32, 1), None
    draws.draw_chunks[(1, 32)](
        logits, logits.stride(0), VOCAB, *unmasked(32), names, counters, torch.ones(32), best,
        NAMED=False, CHUNK=1024, BLOCK=1024,
    )  # fmt: skip
    noise = torch.cat([coupling.gumbel(seed, [seed], VOCAB) for seed in range(32)])
    exact = (logits.double() + noise).amax(dim=1)
    assert (best[:, 0].double() - exact).abs().max() < draws.NEAR.value / 20


def test_of_equal_logits_the_first_is_the_greatest() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [400, 700, 710]] = 2.0
    assert drawn(logits, [KINDS["greedy"]], range(1)) == [400]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_no_distribution_ends_with_some_token(kind: str, value: float) -> None:
    (token,) = drawn(torch.full((1, VOCAB), value), [replace(KINDS[kind], seed=1)], range(1))
    assert 0 <= token < VOCAB


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        *((each, True) for each in KINDS.values()),
        (SamplingParams(top_k=5, top_p=0.5), False),
        (SamplingParams(repetition_penalty=1.2), False),
        (SamplingParams(min_tokens=3), False),
        (SamplingParams(logit_bias={3: 1.0}), False),
        (SamplingParams(temperature=0.0, top_k=5, top_p=0.5), True),
        (SamplingParams(grammar=Grammar("regex", "a")), True),
    ],
)
def test_what_a_device_can_draw(params: SamplingParams, possible: bool) -> None:
    """Neither what needs the tokens before, nor filters of which one applies to what the other leaves."""
    assert drawn_on_device([Rows(params, 1, [0])]) is possible
