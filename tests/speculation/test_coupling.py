"""The coupled rule: noise pinned to the bit, draws that follow p, equality as often as the formula says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from paceline.speculation import coupling, processing
from paceline.types import SamplingParams

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
STEP = 0xD1342543DE82EF95
DRAWS = 120_000
P = (0.5, 0.3, 0.2)
PINNED = [
    [6388005900169914095, 2216564954315853615, 17629943056740933572],
    [15292554605268117, 8074488956565724267, 713428614381330398],
]
"""Of seed 42: tokens 0, 1, 2 at positions 0 and 7, from the reference below."""


def splitmix64(state: int) -> Iterator[int]:
    """Steele, Lea, Flood 2014, in Python's own integers."""
    while True:
        state = (state + GOLDEN) & MASK
        yield finalized(state)


def finalized(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_bits(seed: int, position: int, vocab_size: int) -> list[int]:
    start = finalized((finalized(seed & MASK) + (position + 1) * STEP) & MASK)
    return list(islice(splitmix64(start), vocab_size))


def unsigned(bits: torch.Tensor) -> list[list[int]]:
    return [[value & MASK for value in row] for row in bits.tolist()]


def drawn(probabilities: tuple[float, ...], draws: int = DRAWS, **params: float) -> torch.Tensor:
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    return torch.tensor(coupling.draw(logits, SamplingParams(**{"seed": 5, **params}), range(draws)))


def chi_square(tokens: torch.Tensor, expected: tuple[float, ...]) -> float:
    counts = torch.bincount(tokens, minlength=len(expected)).tolist()
    n = len(tokens)
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, expected, strict=True) if p > 0)


def uniforms(seed: int, positions: range, vocab_size: int) -> torch.Tensor:
    return torch.exp(-torch.exp(-coupling.gumbel(seed, positions, vocab_size)))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# The noise.


def test_the_reference_is_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert list(islice(splitmix64(1234567), 5)) == published


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**31])
def test_bits_equal_the_reference(seed: int, position: int) -> None:
    assert unsigned(coupling.random_bits(seed, [position], 50)) == [reference_bits(seed, position, 50)]


def test_bits_are_pinned_for_all_time() -> None:
    assert unsigned(coupling.random_bits(42, [0, 7], 3)) == PINNED


def test_a_negative_seed_is_its_unsigned_twin() -> None:
    assert torch.equal(coupling.random_bits(-5, [3], 9), coupling.random_bits(2**64 - 5, [3], 9))


def test_noise_is_finite() -> None:
    assert bool(coupling.gumbel(3, range(200), 5000).isfinite().all())


def test_noise_has_the_mean_of_a_gumbel() -> None:
    noise = coupling.gumbel(3, range(1000), 1000)
    assert noise.mean().item() == pytest.approx(0.57722, abs=4 * (math.pi / math.sqrt(6)) / 1000)


def test_no_two_places_share_their_bits() -> None:
    bits = torch.stack([coupling.random_bits(seed, range(300), 300) for seed in range(5)])
    assert bits.unique().numel() == bits.numel()


@pytest.mark.parametrize("apart", [1, 2, 64])
def test_positions_are_independent(apart: int) -> None:
    u = uniforms(9, range(1000 + apart), 100)
    assert correlation(u[apart:], u[:-apart]) == pytest.approx(0, abs=4 / math.sqrt(100_000))


@pytest.mark.parametrize("apart", [1, 2, 2**32])
def test_seeds_are_independent(apart: int) -> None:
    a, b = uniforms(9, range(1000), 100), uniforms(9 + apart, range(1000), 100)
    assert correlation(a, b) == pytest.approx(0, abs=4 / math.sqrt(100_000))


def test_neighbouring_tokens_are_independent() -> None:
    u = uniforms(9, range(1000), 101)
    assert correlation(u[:, 1:], u[:, :-1]) == pytest.approx(0, abs=4 / math.sqrt(100_000))


def test_a_seed_shifted_by_a_position_is_another_seed() -> None:
    a, b = uniforms(9, range(1, 1001), 100), uniforms(10, range(1000), 100)
    assert correlation(a, b) == pytest.approx(0, abs=4 / math.sqrt(100_000))


# What is drawn.


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, P),
        ({"seed": -7}, P),
        ({"temperature": 0.5}, (0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38)),
        ({"top_k": 2}, (0.625, 0.375, 0.0)),
        ({"top_p": 0.75}, (0.625, 0.375, 0.0)),
        ({"min_p": 0.5}, (0.625, 0.375, 0.0)),
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.99, "min_p": 0.1}, (0.25 / 0.34, 0.09 / 0.34, 0.0)),
    ],
    ids=["plain", "negative seed", "temperature", "top-k", "top-p", "min-p", "all four"],
)
def test_draws_follow_the_distribution(params: dict[str, float], expected: tuple[float, ...]) -> None:
    assert chi_square(drawn(P, **params), expected) < 13.8  # 1 in 1000 of a true one, two degrees of freedom


def test_filtered_tokens_are_never_drawn() -> None:
    assert 2 not in drawn(P, top_k=2).unique().tolist()


def coupled_acceptance(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    """P(argmax(log p + g) = argmax(log q + g)) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    tokens = range(len(p))
    return sum(1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in tokens) for i in tokens)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (P, P),
        (P, (0.2, 0.3, 0.5)),
        ((0.5, 0.3, 0.15, 0.05), (0.25, 0.25, 0.25, 0.25)),
        ((0.9, 0.05, 0.05), (0.05, 0.05, 0.9)),
    ],
    ids=["equal", "reversed", "flat", "far apart"],
)
def test_acceptance_is_as_frequent_as_the_formula_says(p: tuple[float, ...], q: tuple[float, ...]) -> None:
    accepted = (drawn(p) == drawn(q)).double().mean().item()
    expected = coupled_acceptance(p, q)
    assert accepted == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS) + 1e-9)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6))
def test_the_formula_keeps_the_bound_the_module_states(weights: list[tuple[float, float]]) -> None:
    p = tuple(a / sum(w[0] for w in weights) for a, _ in weights)
    q = tuple(b / sum(w[1] for w in weights) for _, b in weights)
    tv = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    assert coupled_acceptance(p, q) >= (1 - tv) / (1 + tv) - 1e-9


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-7])
def test_without_temperature_it_is_the_argmax(temperature: float) -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=temperature, seed=1)
    assert coupling.draw(logits, params, range(20)) == logits.argmax(-1).tolist()


def test_greedy_needs_no_seed() -> None:
    assert coupling.draw(torch.tensor([[0.0, 2.0, 1.0]]), SamplingParams(temperature=0.0), [0]) == [1]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8, "top_k": 30, "min_p": 0.01}, {"temperature": 0.0}])
def test_rows_drawn_together_equal_rows_drawn_alone(params: dict[str, float]) -> None:
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(2)) * 3
    settings = SamplingParams(**{"seed": 3, **params})
    alone = [coupling.draw(row[None], settings, [position])[0] for position, row in enumerate(logits, start=40)]
    assert coupling.draw(logits, settings, range(40, 56)) == alone


def test_a_larger_vocabulary_draws_the_same_if_the_rest_is_impossible() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(4))
    padded = torch.cat([logits, torch.full((50, 28), -torch.inf)], dim=-1)
    params = SamplingParams(seed=8)
    assert coupling.draw(padded, params, range(50)) == coupling.draw(logits, params, range(50))


# The processing of logits.


def transformers_scores(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Transformers' warpers in the order in which `generate` applies them."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 20},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_processing_equals_transformers(params: dict[str, float]) -> None:
    logits = torch.randn(30, 700, generator=torch.Generator().manual_seed(6)) * 4
    settings = SamplingParams(**params)
    assert torch.equal(processing.process_logits(logits, settings), transformers_scores(logits, settings))


def test_a_nucleus_wider_than_the_first_look_is_right() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(6)) * 0.1
    params = SamplingParams(top_p=0.9)
    found = processing.process_logits(logits, params)
    assert torch.equal(found, transformers_scores(logits, params))
    assert int(found[0].isfinite().sum()) > 1024


def test_a_wide_row_does_not_change_a_narrow_one() -> None:
    generator = torch.Generator().manual_seed(6)
    wide, narrow = torch.randn(1, 5000, generator=generator) * 0.1, torch.randn(1, 5000, generator=generator) * 9
    params = SamplingParams(top_p=0.9)
    together = processing.process_logits(torch.cat([wide, narrow]), params)
    assert torch.equal(together[1:], processing.process_logits(narrow, params))


def test_ties_at_the_edge_of_top_k_stay_in() -> None:
    scores = processing.process_logits(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), SamplingParams(top_k=2))
    assert scores.isfinite().tolist() == [[True, True, True, False]]


def test_ties_at_the_edge_of_the_nucleus_stay_in() -> None:
    scores = processing.process_logits(torch.tensor([[0.4, 0.25, 0.25, 0.1]]).log(), SamplingParams(top_p=0.5))
    assert scores.isfinite().tolist() == [[True, True, True, False]]


def test_the_logits_given_are_left_as_they_were() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(7))
    before = logits.clone()
    coupling.draw(logits, SamplingParams(seed=1, top_p=0.5, top_k=9, min_p=0.1), range(3))
    assert torch.equal(logits, before)


def test_half_precision_logits_are_processed_in_float32() -> None:
    assert processing.process_logits(torch.zeros(1, 4, dtype=torch.bfloat16), SamplingParams()).dtype == torch.float32


# Acceptance.


@pytest.mark.parametrize(
    ("candidates", "own", "accepted"),
    [
        ([], [4], 0),
        ([4], [4, 5], 1),
        ([4], [5, 4], 0),
        ([4, 5, 6], [4, 5, 6, 7], 3),
        ([4, 5, 6], [4, 9, 6, 7], 1),
        ([4, 5, 6], [9, 5, 6, 7], 0),
        ([4, 4], [4, 4, 4], 2),
    ],
)
def test_the_longest_agreeing_run_is_accepted(candidates: list[int], own: list[int], accepted: int) -> None:
    assert coupling.accept(candidates, own) == accepted
