"""`paceline models …`, its progress, and what `paceline.models` exports."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import paceline.models
from paceline.cli.models import models_app
from paceline.cli.progress import model_progress
from paceline.models import ModelFiles


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(models_app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_list_shows_a_model_that_is_not_there_with_its_download_size() -> None:
    _, out, _ = run("list")
    assert out.splitlines()[1].split()[:5] == ["smollm2-135m", "not", "pulled", "93", "MB"]


def test_path_of_a_folder_is_the_folder(tiny: ModelFiles) -> None:
    assert run("path", str(tiny.path)) == (0, f"{tiny.path}\n", "")


def test_path_of_an_absent_model_is_an_error_line() -> None:
    code, out, error = run("path", "smollm2-135m")
    assert (code, out, error.count("\n"), error[:7]) == (1, "", 1, "error: ")


def test_pull_prints_where_the_model_is(tiny: ModelFiles) -> None:
    assert run("pull", str(tiny.path)) == (0, f"{tiny.path.name} is ready: {tiny.path}\n", "")


def test_pull_of_an_unknown_name_is_an_error_line() -> None:
    code, out, error = run("pull", "gpt-17")
    assert (code, out, error.count("\n"), error[:7]) == (1, "", 1, "error: ")


def test_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(paceline.models, "resolve", interrupted)
    line = "interrupted; resume with the same command: paceline models pull smollm2-135m\n"
    assert run("pull", "smollm2-135m") == (130, "", line)


@pytest.mark.parametrize("command", ["pull", "list", "path"])
def test_help_has_examples(command: str) -> None:
    assert f"Examples:\n    paceline models {command}" in run(command, "--help")[1]


def test_progress_in_a_log_is_a_line_for_each_step() -> None:
    out = io.StringIO()
    with model_progress(Console(file=out)) as progress:
        with progress.task("downloading [it]", 93_000_000) as task:
            task.advance(1)
        with progress.task("converting"):
            pass
    assert out.getvalue() == "downloading [it] (93 MB)\nconverting\n"


def test_progress_on_a_terminal_shows_the_bytes() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with model_progress(console) as progress, progress.task("downloading [it]", 2_000_000):
        pass
    assert "downloading [it]" in out.getvalue() and "0.0/2.0 MB" in out.getvalue()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'httpx', 'huggingface_hub', 'gguf', 'rich.progress'}"
    code = f"import sys, paceline.models, paceline.cli.models; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_exported_names() -> None:
    assert paceline.models.__all__ == [
        "SILENT",
        "CachedModel",
        "CatalogueEntry",
        "ModelFiles",
        "ModelState",
        "Progress",
        "Task",
        "WheelFile",
        "cached",
        "catalogue",
        "eos_token_ids",
        "load_causal_lm",
        "load_config",
        "load_tokenizer",
        "resolve",
        "tokenizer_fingerprint",
        "weights_fingerprint",
    ]
