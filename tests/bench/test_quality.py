"""The statistics of `paceline eval` against values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.bench.quality import Estimate, Scores, Span, compare, exponential, mean, measure, spans, summarize
from paceline.bench.scorers import Scorer
from paceline.errors import ConfigError

P, Q = (0.5, 0.5), (0.25, 0.75)


def logits(*rows: Sequence[float]) -> torch.Tensor:
    """Of these probabilities, up to a constant that must not matter."""
    return torch.tensor(rows).log() + 3.0


def scores(p_loss: Sequence[float], q_loss: Sequence[float], kl: Sequence[float], same: Sequence[float]) -> Scores:
    return Scores(*(np.array(each, dtype=float) for each in (p_loss, q_loss, kl, same)))


class Scripted(Scorer):
    """Uniform over its vocabulary; remembers what it was asked."""

    def __init__(self, vocab: int = 4, longest: int = 100) -> None:
        self._vocab, self._longest = vocab, longest
        self.asked: list[tuple[list[int], int]] = []

    @property
    def longest(self) -> int:
        return self._longest

    def logits(self, ids: Sequence[int], count: int) -> torch.Tensor:
        self.asked.append((list(ids), count))
        return torch.zeros(count, self._vocab)


def test_windows_overlap_as_the_picture_shows() -> None:
    assert list(spans(14, 8, 4)) == [Span(0, 1, 8), Span(4, 8, 12), Span(6, 12, 14)]


def test_a_short_text_is_one_window() -> None:
    assert list(spans(5, 8, 4)) == [Span(0, 1, 5)]


@given(st.integers(1, 300), st.integers(2, 60), st.data())
def test_every_token_but_the_first_is_scored_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored = [token for span in spans(tokens, context, stride) for token in range(span.first, span.end)]
    assert scored == list(range(1, tokens))


@given(st.integers(1, 300), st.integers(2, 60), st.data())
def test_tokens_behind_the_first_window_have_context_less_stride_before_them(
    tokens: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    later = list(spans(tokens, context, stride))[1:]
    assert all(span.first - span.begin >= context - stride for span in later)
    assert all(span.end - span.begin <= context for span in later)


@pytest.mark.parametrize("stride", [0, 8])
def test_a_stride_that_is_no_part_of_the_context_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match="--stride"):
        list(spans(20, 8, stride))


def test_losses_are_negative_logs_of_what_followed() -> None:
    found = compare(logits(P), logits(Q), [1])
    assert (found.p_loss[0], found.q_loss[0]) == pytest.approx((math.log(2), -math.log(0.75)))


def test_kl_is_of_the_reference_from_the_candidate() -> None:
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert compare(logits(P), logits(Q), [0]).kl[0] == pytest.approx(expected, abs=1e-7)


def test_kl_of_equal_distributions_is_zero() -> None:
    x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert compare(x, x + 2.0, [1] * 5).kl == pytest.approx(np.zeros(5), abs=1e-12)


def test_a_token_the_reference_excludes_adds_nothing() -> None:
    found = compare(torch.tensor([[0.0, float("-inf")]]), torch.tensor([[0.0, 0.0]]), [0])
    assert found.kl[0] == pytest.approx(math.log(2))


def test_agreement_is_on_the_likeliest_token() -> None:
    found = compare(logits((0.6, 0.4), (0.6, 0.4)), logits((0.9, 0.1), (0.3, 0.7)), [0, 0])
    assert found.same.tolist() == [1.0, 0.0]


def test_more_rows_than_are_compared_at_a_time_stay_in_order() -> None:
    x = torch.randn(150, 7, generator=torch.Generator().manual_seed(0))
    ids = [n % 7 for n in range(150)]
    expected = torch.nn.functional.cross_entropy(x.double(), torch.tensor(ids), reduction="none")
    assert compare(x, x, ids).p_loss == pytest.approx(expected.numpy())


def test_a_padded_vocabulary_is_cut_to_the_other() -> None:
    padded = torch.cat((logits(P), torch.tensor([[50.0]])), dim=1)
    assert compare(padded, logits(P), [0]).kl[0] == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_equal_windows_is_that_of_their_means() -> None:
    assert mean([np.array([1.0]), np.array([3.0])]) == Estimate(2.0, 1.0)


def test_windows_count_by_their_tokens() -> None:
    """Sums 2 and 4, sizes 2 and 1, mean 2: the sums are 2 and 2 off, sqrt(8 x 2 / 1) / 3."""
    assert mean([np.array([1.0, 1.0]), np.array([4.0])]) == Estimate(2.0, pytest.approx(4 / 3))


def test_one_window_has_no_error() -> None:
    assert mean([np.array([1.0, 5.0])]) == Estimate(3.0, None)


def test_the_error_of_an_exponential_grows_with_it() -> None:
    assert exponential(Estimate(math.log(10), 0.1)) == Estimate(pytest.approx(10.0), pytest.approx(1.0))


def test_perplexities_and_their_ratio() -> None:
    half, quarter, eighth = math.log(2), math.log(4), math.log(8)
    found = summarize([scores([half], [quarter], [0.0], [1.0]), scores([quarter], [eighth], [0.0], [1.0])])
    values = (found.p_perplexity.value, found.q_perplexity.value, found.change.value)
    assert values == pytest.approx((2**1.5, 2**2.5, 1.0))


def test_a_change_that_is_the_same_everywhere_has_no_error_though_texts_differ() -> None:
    found = summarize([scores([1.0], [1.1], [0.0], [1.0]), scores([5.0], [5.1], [0.0], [1.0])])
    assert found.change.error == pytest.approx(0.0, abs=1e-12)


def test_the_tail_is_the_99th_percentile_of_single_tokens() -> None:
    tokens = list(range(101))
    found = summarize([scores([0.0] * 101, [0.0] * 101, tokens, [1.0] * 101)])
    assert (found.kl_p99, found.kl.value) == (99.0, 50.0)


def test_both_models_see_the_same_windows() -> None:
    reference, candidate = Scripted(), Scripted()
    measure(reference, candidate, [0, 1, 2, 3, 0, 1, 2], context=4, stride=2)
    assert reference.asked == candidate.asked == [([0, 1, 2], 3), ([2, 3, 0], 2), ([3, 0, 1], 1)]


def test_a_uniform_model_has_its_vocabulary_for_a_perplexity() -> None:
    found = measure(Scripted(4), Scripted(4), [0, 1, 2, 3, 0, 1, 2], context=4, stride=2)
    assert (found.q_perplexity.value, found.tokens, found.windows) == (pytest.approx(4.0), 6, 3)


def test_every_window_begins_with_the_prefix() -> None:
    reference = Scripted()
    measure(reference, Scripted(), [3, 0, 1, 2, 0, 1, 2], context=4, stride=2, prefix=1)
    assert [ids for ids, _ in reference.asked] == [[3, 0, 1], [3, 2, 0], [3, 0, 1]]


def test_progress_is_told_up_to_the_last_token() -> None:
    told: list[tuple[int, int]] = []
    measure(
        Scripted(), Scripted(), [0] * 7, context=4, stride=2, on_scored=lambda done, total: told.append((done, total))
    )
    assert told == [(3, 6), (5, 6), (6, 6)]


def test_a_context_beyond_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--context: 8 is beyond the 7 tokens"):
        measure(Scripted(), Scripted(longest=7), [0] * 9, context=8, stride=2)


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="--text"):
        measure(Scripted(), Scripted(), [0], context=4, stride=2)
