"""Dashboards and alerts ask for what a server exports, by labels that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest

from paceline.api.metrics import FAMILIES
from tests.monitoring.files import DASHBOARDS, expressions, rules, wanted

EXPORTED = {name: {*family.all_labels, "job", "instance"} for family in FAMILIES for name in family.series}
BUCKETS = {name: labels | {"le"} for name, labels in EXPORTED.items() if name.endswith("_bucket")}
LABELS = {**EXPORTED, **BUCKETS}
ASKED = [text for path in DASHBOARDS for text in expressions(path)] + [rule["expr"] for rule in rules()]


def parts(expression: Any) -> Iterator[Any]:
    """An expression, and all it is made of."""
    yield expression
    inner = [getattr(expression, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for each in (*inner, *(getattr(expression, "args", None) or ())):
        if each is not None:
            yield from parts(each)


def series(expression: Any) -> list[Any]:
    return [part for part in parts(expression) if isinstance(part, promql_parser.VectorSelector)]


def test_every_name_is_exported() -> None:
    assert sorted(wanted() - EXPORTED.keys()) == []


@pytest.mark.parametrize("text", sorted(set(ASKED)))
def test_series_are_chosen_by_labels_that_they_have(text: str) -> None:
    for each in series(promql_parser.parse(text)):
        if each.name in LABELS:
            chosen = {matcher.name for matcher in each.matchers.matchers}
            assert chosen <= LABELS[each.name], each


@pytest.mark.parametrize("text", sorted(set(ASKED)))
def test_sums_are_by_labels_that_the_series_have(text: str) -> None:
    for part in parts(promql_parser.parse(text)):
        made = any(getattr(inner, "func", None) and inner.func.name == "label_replace" for inner in parts(part))
        if not isinstance(part, promql_parser.AggregateExpr) or part.modifier is None or made:
            continue
        for each in series(part.expr):
            if each.name in LABELS:
                assert set(part.modifier.labels) <= LABELS[each.name], (part.prettify(), each.name)
