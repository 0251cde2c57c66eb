"""The rule by which a streaming window drops tokens, and which window a request gets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import InvalidRequest
from paceline.sessions.rules import WindowRules
from paceline.sessions.window import StreamingWindow
from paceline.types import MAX_TOKENS, SamplingParams


@st.composite
def windows(draw: st.DrawFn) -> StreamingWindow:
    n_keep = draw(st.integers(0, 6))
    ctx_size = n_keep + draw(st.integers(2, 20))
    return StreamingWindow(ctx_size, n_keep, draw(st.just(-1) | st.integers(1, ctx_size - n_keep - 1)))


@given(windows(), st.integers(0, 200))
def test_what_is_dropped_is_what_dropping_step_by_step_leaves(window: StreamingWindow, length: int) -> None:
    held = dropped = 0
    for _ in range(length):
        if held == window.ctx_size:
            held, dropped = held - window.n_discard, dropped + window.n_discard
        held += 1
    assert window.dropped(length) == dropped


@given(windows(), st.integers(1, 200))
def test_at_the_edge_the_window_is_full_and_not_before(window: StreamingWindow, length: int) -> None:
    edge = window.edge(length)
    assert length <= edge and edge - window.dropped(edge) == window.ctx_size
    assert window.dropped(edge) == window.dropped(length) == window.dropped(edge + 1) - window.n_discard


def test_minus_one_discards_half_of_what_is_behind_the_sinks() -> None:
    assert StreamingWindow(512, 4, -1) == StreamingWindow(512, 4, 254)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((5, 4, -1), "ctx_size"),
        ((1, 0, -1), "ctx_size"),
        ((16, -1, -1), "n_keep"),
        ((16, 4, 0), "n_discard"),
        ((16, 4, 12), "n_discard"),
        ((16, 4, -2), "n_discard"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(values: tuple[int, int, int], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: ") as refused:
        StreamingWindow(*values)
    assert refused.value.param == field


RULES = WindowRules(largest=100, ctx_size=40, n_keep=2, n_discard=8)


@pytest.mark.parametrize(
    ("rules", "asked", "expected"),
    [
        (RULES, {}, StreamingWindow(40, 2, 8)),
        (RULES, {"ctx_size": 30}, StreamingWindow(30, 2, 8)),
        (RULES, {"n_keep": 0}, StreamingWindow(40, 0, 8)),
        (RULES, {"n_discard": -1}, StreamingWindow(40, 2, 19)),
        (RULES, {"ctx_size": 0}, None),
        (WindowRules(100), {}, None),
        (WindowRules(100), {"ctx_size": 30}, StreamingWindow(30)),
    ],
)
def test_a_request_s_own_window_goes_before_the_server_s(
    rules: WindowRules, asked: dict[str, Any], expected: StreamingWindow | None
) -> None:
    assert rules.resolve(SamplingParams(**asked)).window == expected


def test_resolving_twice_changes_nothing() -> None:
    once = RULES.resolve(SamplingParams(n_keep=5))
    assert WindowRules(100).resolve(once) == RULES.resolve(once) == once


@pytest.mark.parametrize(
    ("rules", "asked", "field"),
    [
        (WindowRules(100), {"n_keep": 3}, "n_keep"),
        (RULES, {"ctx_size": 0, "n_discard": 3}, "n_discard"),
        (RULES, {"ctx_size": 101}, "ctx_size"),
        (RULES, {"ctx_size": 10}, "n_discard"),
        (WindowRules(100, refusal="it has learned positions"), {"ctx_size": 10}, "ctx_size"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_its_name(rules: WindowRules, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: ") as refused:
        rules.resolve(SamplingParams(**asked))
    assert refused.value.param == field


def test_under_a_window_the_model_s_length_bounds_nothing() -> None:
    assert [RULES.longest(RULES.resolve(SamplingParams(ctx_size=size))) for size in (30, 0)] == [MAX_TOKENS, 100]
