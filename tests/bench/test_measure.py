"""Interleaved rounds: what is compared runs in turn, and the first round does not count."""

from __future__ import annotations

from paceline.bench.measure import Figure, rounds


def test_subjects_take_turns_and_the_first_round_does_not_count() -> None:
    called: list[str] = []

    def subject(name: str, values: list[float]) -> float:
        called.append(name)
        return values.pop(0)

    a, b = [99.0, 1.0, 3.0], [99.0, 10.0, 30.0]
    figures = rounds({"a": lambda: subject("a", a), "b": lambda: subject("b", b)}, "ms", repeats=2)
    assert called == ["a", "b"] * 3
    assert (figures["a"].values, figures["b"].values) == ((1.0, 3.0), (10.0, 30.0))


def test_a_figure_has_median_and_range() -> None:
    figure = Figure("x", "ms", (5.0, 1.0, 2.0))
    assert (figure.median, figure.low, figure.high) == (2.0, 1.0, 5.0)
