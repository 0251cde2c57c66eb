"""The chart's schema and table follow from its commented values."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import helm_python
import pytest

from tests.k8s.charts import CHART, ROOT

READ = runpy.run_path(str(ROOT / "helm" / "values_file.py"))["read"]


def test_the_files_are_what_the_values_say() -> None:
    built = [sys.executable, ROOT / "helm" / "build.py", "--check"]
    ran = subprocess.run(built, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_chart_packages(tmp_path: Path) -> None:
    with helm_python.Chart.load(CHART) as chart:
        packed = chart.save(tmp_path)
    with helm_python.Chart.load(packed) as chart:
        assert "RayService" in "".join(chart.render({}, name="demo").values())


def values(tmp_path: Path, text: str) -> list[object]:
    (tmp_path / "values.yaml").write_text(text)
    return list(READ(tmp_path / "values.yaml"))


def test_a_value_without_a_comment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"values\.yaml: a\.b has no comment"):
        values(tmp_path, "# A section.\na:\n  b: 1\n")


def test_a_comment_is_the_lines_right_above(tmp_path: Path) -> None:
    (value,) = values(tmp_path, "# Of something else.\n\n# One\n# and two.\na: 1\n")
    assert value.comment.description == "One and two."  # type: ignore[attr-defined]


def test_a_map_in_braces_is_one_value(tmp_path: Path) -> None:
    (value,) = values(tmp_path, "# Free.\na: {b: 1, c: 2}\n")
    assert value.children == ()  # type: ignore[attr-defined]
