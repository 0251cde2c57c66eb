"""`paceline bench engine` on the real small model: every figure is there and is a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.bench.engine import EngineBench, Sizes, quality, settings
from paceline.cli.app import app
from paceline.engine.load import LoadedModel, load_model
from paceline.models import ModelFiles, load_causal_lm

SMALL = Sizes(tokens=3, repeats=1, step_repeats=1)


@pytest.fixture(scope="module")
def loaded(smollm2: ModelFiles) -> LoadedModel:
    return load_model(smollm2.path, settings(threads=None))


def test_a_step_is_measured_against_its_products(loaded: LoadedModel) -> None:
    figures = EngineBench(loaded, SMALL).step_figures()
    assert list(figures) == ["step of 1", "products of 1", "step of 6", "products of 6"]
    assert all(figure.median > 0 for figure in figures.values())


def test_a_benchmark_leaves_no_kv_behind(loaded: LoadedModel) -> None:
    bench = EngineBench(loaded, SMALL)
    bench.step_figures()
    assert bench.decode(streams=4) > 0
    assert bench.prefill(64) > 0
    usage = bench.engine.kv.usage()
    assert usage.free == usage.total


def test_the_default_backends_are_float32_on_real_text(loaded: LoadedModel, smollm2: ModelFiles) -> None:
    """KL under 1e-3 is what a default may cost; weights kept exactly and activations of 16 bits cost rounding."""
    found = quality(loaded, load_causal_lm(smollm2.path, dtype="float32", device="cpu"), tokens=64)
    assert 0 <= found.kl.value < 1e-6
    assert found.q_perplexity.value == pytest.approx(found.p_perplexity.value, rel=1e-4)


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "engine", "--quick", "--json", str(report)])
    assert result.exit_code == 0, result.output
    figures = json.loads(report.read_text())["figures"]
    assert {"step of 1", "decode, 16 streams", "transformers fp32: decode"} <= figures.keys()


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "engine", "--gguf", str(tmp_path / "none.gguf")])
    assert "none.gguf: no such file" in str(result.exception)
