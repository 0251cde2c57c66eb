"""Rejection sampling: streams apart, rows as they are sent, and the rule for every kind of row a drafter may send."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.speculation import coupling, rejection
from paceline.speculation.frames import SparseRow
from paceline.speculation.rejection import Guess, Purpose, Verdict, uniform, usable
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams

DRAWS = 10_000
P = (0.4, 0.3, 0.15, 0.1, 0.05, 0.0)
Q = (0.05, 0.1, 0.1, 0.15, 0.2, 0.4)
UNLIKELY = {3: 25.9, 4: 28.5, 5: 30.9}
"""Of chi-square, by degrees of freedom: passed by one in 100,000."""


PINNED = [0.9305795708905479, 0.26408321842741767, 0.6090418827297733, 0.8879286680507793]
"""Of seed 42 at position 7, by purpose."""


def seeded(n: int, **params: object) -> list[SamplingParams]:
    return [SamplingParams(seed=seed, **params) for seed in range(n)]  # type: ignore[arg-type]


def draft_of(q: Sequence[float], params: Sequence[SamplingParams]) -> list[tuple[int, SparseRow]]:
    logits = torch.tensor(q).log().expand(len(params), -1)
    return rejection.draft(logits, [Rows(p, 1, [0]) for p in params])


def verdicts(params: Sequence[SamplingParams], guesses: Sequence[Guess], p: Sequence[float] = P) -> list[Verdict]:
    batch = [Rows(each, 1, [0], g.tokens, len(g.tokens) + 1) for each, g in zip(params, guesses, strict=True)]
    return rejection.verify(torch.tensor(p).log().expand(sum(rows.count for rows in batch), -1), batch, guesses)


def fits(tokens: Sequence[int], expected: Sequence[float]) -> bool:
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).tolist()
    pairs = [(count, len(tokens) * p) for count, p in zip(counts, expected, strict=True)]
    assert all(count == 0 for count, mean in pairs if mean == 0)
    used = [(count, mean) for count, mean in pairs if mean > 0]
    return sum((count - mean) ** 2 / mean for count, mean in used) < UNLIKELY[len(used) - 1]


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


# The streams.


def stream(purpose: Purpose) -> Callable[[int, int], float]:
    return lambda seed, position: uniform(seed, purpose, position)


def coupled_noise(token: int) -> Callable[[int, int], float]:
    return lambda seed, position: math.exp(-math.exp(-coupling.gumbel(seed, [position], token + 1)[0, token].item()))


STREAMS = {
    **{f"rejection {purpose.name}": stream(purpose) for purpose in Purpose},
    **{f"coupled, token {token}": coupled_noise(token) for token in (0, 1)},
}


@pytest.mark.parametrize(("one", "other"), itertools.combinations(STREAMS, 2))
@pytest.mark.slow
def test_two_streams_are_independent(one: str, other: str) -> None:
    places = [(seed, position) for seed in range(100) for position in range(100)]
    a, b = ([STREAMS[name](*place) for place in places] for name in (one, other))
    assert abs(correlation(a, b)) < 4 / math.sqrt(len(places))


@pytest.mark.parametrize("purpose", Purpose)
def test_a_stream_is_uniform(purpose: Purpose) -> None:
    cells = [int(5 * uniform(seed, purpose, position)) for seed in range(200) for position in range(100)]
    assert fits(cells, (0.2,) * 5)


@pytest.mark.parametrize(("apart", "name"), [((1, 0), "seeds"), ((0, 1), "positions"), ((1, -1), "diagonals")])
def test_neighbours_in_a_stream_are_independent(apart: tuple[int, int], name: str) -> None:
    places = [(seed, position) for seed in range(100) for position in range(1, 101)]
    a = [uniform(seed, Purpose.ACCEPT, position) for seed, position in places]
    b = [uniform(seed + apart[0], Purpose.ACCEPT, position + apart[1]) for seed, position in places]
    assert abs(correlation(a, b)) < 4 / math.sqrt(len(places))


def test_numbers_are_pinned_for_all_time() -> None:
    assert [uniform(42, purpose, 7) for purpose in Purpose] == PINNED


# What the drafter sends.


def test_candidates_are_drawn_from_the_row_that_is_sent() -> None:
    assert fits([token for token, _ in draft_of(Q, seeded(DRAWS))], Q)


def test_the_row_is_the_processed_distribution() -> None:
    ((_, row),) = draft_of(Q, seeded(1, temperature=0.5, top_k=2))
    assert row.ids == (5, 4)
    assert row.probs == pytest.approx((0.8, 0.2))


def test_a_row_keeps_the_likeliest_and_sums_to_one() -> None:
    q = torch.randn(500, generator=torch.Generator().manual_seed(1)).softmax(-1)
    ((token, row),) = draft_of(q.tolist(), seeded(1))
    assert sorted(row.ids) == sorted(q.topk(rejection.TOP_K).indices.tolist())
    assert (token in row.ids, math.fsum(row.probs)) == (True, pytest.approx(1, abs=1e-6))


def test_every_probability_is_a_float32() -> None:
    ((_, row),) = draft_of(Q, seeded(1))
    assert torch.tensor(row.probs, dtype=torch.float32).tolist() == list(row.probs)


def test_a_greedy_candidate_is_certain() -> None:
    assert draft_of(Q, [SamplingParams(temperature=0)]) == [(5, SparseRow((5,), (1.0,)))]


def test_a_mixed_batch_is_drafted_as_each_member_alone() -> None:
    params = [SamplingParams(seed=3, top_p=0.5), SamplingParams(temperature=0), SamplingParams(seed=3, min_p=0.3)]
    assert draft_of(Q, params) == [drafted for each in params for drafted in draft_of(Q, [each])]


def test_nothing_to_draft_is_nothing() -> None:
    assert rejection.draft(torch.zeros(0, 6), []) == []


# The rule.


def test_a_candidate_is_accepted_as_often_as_the_papers_say() -> None:
    params = seeded(DRAWS)
    found = verdicts(params, [Guess((token,), (row,)) for token, row in draft_of(Q, params)])
    expected = sum(map(min, P, Q))
    rate = sum(verdict.accepted for verdict in found) / DRAWS
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / DRAWS))


def test_tokens_follow_the_target() -> None:
    params = seeded(DRAWS)
    found = verdicts(params, [Guess((token,), (row,)) for token, row in draft_of(Q, params)])
    assert fits([verdict.tokens[0] for verdict in found], P)


def test_a_certain_candidate_leaves_the_targets_distribution() -> None:
    found = verdicts(seeded(DRAWS), [Guess((1,))] * DRAWS)
    assert fits([verdict.tokens[0] for verdict in found], P)
    assert sum(verdict.accepted for verdict in found) / DRAWS == pytest.approx(P[1], abs=0.02)


def test_without_candidates_the_target_draws_its_own() -> None:
    assert fits([verdict.tokens[0] for verdict in verdicts(seeded(DRAWS), [Guess()] * DRAWS)], P)


def test_after_full_acceptance_the_token_is_the_targets_own() -> None:
    found = verdicts(seeded(DRAWS), [Guess((0,), (SparseRow((0,), (1.0,)),))] * DRAWS, p=(1.0, 0.0))
    assert {tuple(verdict.tokens) for verdict in found} == {(0, 0)}


def test_the_same_candidates_give_the_same_tokens() -> None:
    params = seeded(200)
    guesses = [Guess((token,), (row,)) for token, row in draft_of(Q, params)]
    assert verdicts(params, guesses) == verdicts(params, guesses)


def test_a_batch_of_different_members_gives_each_what_it_gets_alone() -> None:
    params = [SamplingParams(seed=n, top_p=0.9) for n in range(6)] + [SamplingParams(temperature=0)] * 2
    rows = [row for _, row in draft_of(Q, seeded(3))]
    tokens = [token for token, _ in draft_of(Q, seeded(3))]
    guesses = [
        Guess(),
        Guess(tokens[:1], rows[:1]),
        Guess(tokens, rows),
        Guess((0, 0, 0, 0)),
        Guess(tokens[:1], rows[:1], impossible=rows[1]),
        Guess(tokens, (*rows[:1], SparseRow((), ()), rows[2])),
        Guess((0, 3)),
        Guess((3, 0)),
    ]
    alone = [verdicts([p], [guess])[0] for p, guess in zip(params, guesses, strict=True)]
    assert verdicts(params, guesses) == alone


@pytest.mark.parametrize(("candidates", "tokens"), [((0, 0), [0, 0, 0]), ((0, 1), [0, 0]), ((1,), [0]), ((), [0])])
def test_greedy_accepts_iff_it_is_the_likeliest(candidates: tuple[int, ...], tokens: list[int]) -> None:
    (verdict,) = verdicts([SamplingParams(temperature=0)], [Guess(candidates)])
    assert verdict == Verdict(tokens, len(tokens) - 1)


def test_filtered_tokens_are_refused() -> None:
    (verdict,) = verdicts([SamplingParams(seed=1, top_k=1)], [Guess((1,), (SparseRow((0, 1), (0.5, 0.5)),))])
    assert verdict == Verdict([0], 0)


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda found: sum(found) > 0.01),
    st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda found: sum(found) > 0.01),
    st.integers(0, 2**64 - 1),
)
def test_no_impossible_token_comes_out(p: list[float], q: list[float], seed: int) -> None:
    params = [SamplingParams(seed=seed)]
    ((token, row),) = draft_of(q, params)
    (verdict,) = verdicts(params, [Guess((token,), (row,)) if token < len(p) else Guess((), (), row)], p)
    assert all(p[token] > 0 for token in verdict.tokens)


# Rows as no drafter should send them, and as a larger one may.


def test_an_unknown_id_is_refused_and_not_passed_over() -> None:
    """A drafter with 6 tokens before a target with 4: half of its mass is beyond."""
    params, p = seeded(DRAWS), (0.4, 0.3, 0.2, 0.1)
    guesses = [Guess((t,), (row,)) if t < 4 else Guess((), (), impossible=row) for t, row in draft_of(Q, params)]
    assert fits([verdict.tokens[0] for verdict in verdicts(params, guesses, p)], p)


NOT_ROWS = {
    "empty": SparseRow((), ()),
    "another token": SparseRow((1,), (1.0,)),
    "no chance": SparseRow((0, 1), (0.0, 1.0)),
    "too little": SparseRow((0, 1), (0.4, 0.4)),
    "too much": SparseRow((0, 1), (0.9, 0.9)),
    "negative": SparseRow((0, 1), (1.5, -0.5)),
    "nan": SparseRow((0, 1), (math.nan, 1.0)),
    "infinite": SparseRow((0, 1), (math.inf, 1.0)),
    "huge": SparseRow((0, 1), (1e308, 1e308)),
    "twice": SparseRow((0, 0), (0.5, 0.5)),
    "ragged": SparseRow((0, 1), (1.0,)),
    "below zero": SparseRow((0, -1), (0.5, 0.5)),
}


@pytest.mark.parametrize("row", NOT_ROWS.values(), ids=NOT_ROWS)
def test_a_row_that_is_none_is_not_usable(row: SparseRow) -> None:
    assert not usable(0, row)


@pytest.mark.parametrize("row", NOT_ROWS.values(), ids=NOT_ROWS)
def test_a_candidate_with_an_unusable_row_counts_as_not_proposed(row: SparseRow) -> None:
    params = seeded(50)
    found = verdicts(params, [Guess((0, 1), (row, SparseRow((1,), (1.0,))))] * 50)
    assert found == verdicts(params, [Guess()] * 50)


def test_candidates_before_an_unusable_row_are_verified() -> None:
    params = seeded(50)
    certain = SparseRow((0,), (1.0,))
    found = verdicts(params, [Guess((0, 0), (certain, SparseRow((), ())))] * 50)
    assert found == verdicts(params, [Guess((0,), (certain,))] * 50)


def test_too_few_rows_cover_the_first_candidates() -> None:
    params, row = seeded(50), SparseRow((0,), (1.0,))
    assert verdicts(params, [Guess((0, 0), (row,))] * 50) == verdicts(params, [Guess((0,), (row,))] * 50)


def test_rounding_in_the_sum_is_taken_out() -> None:
    params = seeded(DRAWS)
    guesses = [
        Guess((token,), (SparseRow(row.ids, tuple(q * 1.0005 for q in row.probs)),))
        for token, row in draft_of(Q, params)
    ]
    exact = [Guess((token,), (row,)) for token, row in draft_of(Q, params)]
    assert verdicts(params, guesses) == verdicts(params, exact)
