"""`paceline eval` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.bench import evaluation
from paceline.cli.options import engine_settings
from paceline.config import EngineSettings
from paceline.errors import ConfigError
from tests.bench.folders import words, write_model
from tests.cli.conftest import Run

FAST = ("--set", "device=cpu", "--set", "threads=1", "--context", "32", "--stride", "16", "--tokens", "80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(200))
    return path


def report(run: Run, *arguments: str | Path) -> dict[str, Any]:
    outcome = run("eval", *map(str, arguments), *FAST, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_settings_are_yaml_under_their_own_or_their_full_names() -> None:
    found = engine_settings(["kv_dtype=int8", "engine.threads=2", "ctx_size=null"], "--set")
    assert found == EngineSettings(kv_dtype="int8", threads=2, ctx_size=None)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("kv_dtype", "--set: 'kv_dtype': give key=value"),
        ("kv_type=int8", "engine.kv_type: unknown key"),
        ("threads=few", "engine.threads: .* or .*'auto'"),
        ("threads=[", "--set: 'threads=\\['.*YAML"),
    ],
)
def test_a_wrong_setting_is_named(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_settings([pair], "--set")


def test_exact_products_are_the_models_own_code(run: Run, folder: Path, text: Path) -> None:
    found = report(run, folder, "--text", text, "--set", "linear_backend=torch")
    assert found["kl"]["value"] < 1e-9
    assert found["agreement"]["value"] == 1.0


def test_every_token_but_the_first_is_scored(run: Run, folder: Path, text: Path) -> None:
    found = report(run, folder, "--text", text)
    assert (found["tokens"], found["windows"], found["text"]) == (79, 4, str(text))


def test_quantized_keys_and_values_cost_something(run: Run, folder: Path, text: Path) -> None:
    found = report(run, folder, "--text", text, "--set", "kv_dtype=int8")
    assert 1e-6 < found["kl"]["value"] < 1e-2
    assert found["settings"] == {"device": "cpu", "threads": 1, "kv_dtype": "int8"}


def test_decoding_is_judged_too(run: Run, folder: Path, text: Path) -> None:
    found = report(run, folder, "--text", text, "--set", "linear_backend=torch", "--decode", "1")
    assert (found["decode"], found["kl"]["value"] < 1e-9) == (1, True)


def test_the_reference_may_be_another_configuration(run: Run, folder: Path, text: Path) -> None:
    both = ("--set", "kv_dtype=int8", "--reference-set", "kv_dtype=int8")
    found = report(run, folder, "--text", text, *both)
    assert found["kl"]["value"] < 1e-9
    assert found["reference"].endswith(", kv_dtype int8")


def test_the_reference_may_be_another_model(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=7)
    assert report(run, folder, "--text", text, "--reference", other)["kl"]["value"] > 0.1


def test_a_model_with_another_tokenizer_is_no_reference(run: Run, folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", shift=1)
    outcome = run("eval", str(folder), "--reference", str(other), *FAST)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (1, "error: --reference: other has another tokenizer")


def test_the_table_has_every_figure(run: Run, folder: Path, text: Path) -> None:
    out = run("eval", str(folder), "--text", str(text), *FAST).out
    wanted = (
        "perplexity, reference",
        "change of perplexity",
        "KL(reference‖candidate)",
        "99th percentile",
        "likeliest",
    )
    assert [name for name in wanted if name not in out] == []


def test_a_context_beyond_the_model_is_refused(run: Run, folder: Path, text: Path) -> None:
    outcome = run("eval", str(folder), "--text", str(text), "--context", "1024")
    assert (outcome.code, outcome.err) == (1, "error: --context: 1024 is beyond the 512 tokens both models take\n")


def test_a_wrong_stride_is_refused_before_anything_is_loaded(run: Run) -> None:
    outcome = run("eval", "no-such-model", "--context", "16", "--stride", "16")
    assert outcome.err == "error: --stride: 16 is not from 1 to 15, below --context\n"


def test_ctrl_c_ends_in_one_line(run: Run, folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "measure", interrupt)
    outcome = run("eval", str(folder), "--text", str(text), *FAST)
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def test_tasks_without_the_harness_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = run("eval", "no-such-model", "--tasks", "hellaswag")
    assert (outcome.code, outcome.err) == (1, "error: --tasks: needs lm-eval (pip install 'paceline[eval]')\n")
