"""The defaults and the presets: valid, and as they were. A difference that is meant: python -m tests.k8s.snapshot."""

from __future__ import annotations

import helm_python
import pytest

from paceline.config import parse_settings
from tests.k8s import charts, snapshot
from tests.k8s.checks import problems

cases = pytest.mark.parametrize("case", snapshot.CASES)


@cases
def test_is_as_it_was(case: str) -> None:
    assert snapshot.text(case) == (snapshot.FOLDER / f"{case}.yaml").read_text()


@cases
def test_is_valid(case: str) -> None:
    assert problems(charts.render(snapshot.CASES[case])) == []


@cases
def test_paceline_takes_its_settings(case: str) -> None:
    parse_settings(charts.args(charts.rayservice(snapshot.CASES[case])))


@cases
def test_lints_strictly(case: str) -> None:
    result = helm_python.lint(charts.CHART, values=snapshot.CASES[case], strict=True)
    assert result["errors"] == []
