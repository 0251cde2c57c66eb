"""Every value of the chart does something, and what it does is valid."""

from __future__ import annotations

import json
from functools import cache

import pytest

from tests.k8s import charts
from tests.k8s.checks import problems
from tests.k8s.leaves import NEEDS, OTHER, SILENT, Leaf, all_paths, leaves

LEAVES = list(leaves())


@cache
def rendered(values: str) -> list[charts.Object]:
    """Most values are changed beside nothing else."""
    return charts.render(json.loads(values))


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.path)
def test_changes_what_is_rendered(leaf: Leaf) -> None:
    changed = charts.render(leaf.changed)
    assert changed != rendered(json.dumps(leaf.base))
    assert problems(changed) == []


def test_the_tables_name_values_that_exist() -> None:
    assert (OTHER.keys() | NEEDS.keys() | SILENT.keys()) - all_paths() == set()
