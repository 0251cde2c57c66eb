"""`paceline bench speculation`: its tasks, its draft, and every figure on the real small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.bench.engine import settings
from paceline.bench.speculation import (
    Sizes,
    SpeculationBench,
    chat_prompts,
    grounded_prompts,
    synthetic_draft,
)
from paceline.cli.app import app
from paceline.engine.load import LoadedModel, load_model
from paceline.models import ModelFiles, resolve
from paceline.speculation.cost import VerifyCost

SMALL = Sizes(answer=4, tokens=4, repeats=1, depths=(0, 2), tasks=1)


@pytest.fixture(scope="module")
def loaded(smollm2: ModelFiles) -> LoadedModel:
    return load_model(smollm2.path, settings(threads=None))


@pytest.fixture(scope="module")
def bench(loaded: LoadedModel) -> SpeculationBench:
    return SpeculationBench(loaded, SMALL, VerifyCost({1: 0.015, 6: 0.02, 16: 0.04}))


def test_the_tasks_are_there_and_each_once() -> None:
    prompts = grounded_prompts() + chat_prompts()
    assert (len(grounded_prompts()), len(chat_prompts()), len(set(prompts))) == (15, 6, 21)


def test_answers_are_measured_plain_and_with_lookup(bench: SpeculationBench) -> None:
    figures = bench.answers("grounded", grounded_prompts())
    assert list(figures) == ["grounded, plain", "grounded, prompt lookup"]
    assert all(figure.median > 0 for figure in figures.values())


def test_a_draft_is_measured_beside_them(bench: SpeculationBench) -> None:
    draft = load_model(resolve("smollm2-135m-draft").path, settings(threads=None))
    figures = bench.answers("chat", chat_prompts(), draft, temperature=0.8)
    assert list(figures) == ["chat, plain", "chat, prompt lookup", "chat, draft and lookup"]


def test_every_synthetic_figure_says_so(bench: SpeculationBench, loaded: LoadedModel, tmp_path: Path) -> None:
    draft = synthetic_draft(loaded, 0.015, tmp_path, threads=None)
    figures = bench.synthetic(2, draft)
    assert list(figures) == [f"synthetic 0.8, batch 2, {what}" for what in ("depth 0", "depth 2", "auto")]
    assert all(figure.median > 0 for figure in figures.values())


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "speculation", "--quick", "--json", str(report)])
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert {"grounded, prompt lookup", "synthetic 0.8, batch 1, auto"} <= found["figures"].keys()
    assert found["pass_ms"]["1"] > 0
