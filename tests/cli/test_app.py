from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from paceline.cli import app as cli
from paceline.errors import ModelError
from tests.cli.conftest import Run

COMMANDS = [
    "serve",
    "chat",
    "status",
    "top",
    "doctor",
    "demo",
    "estimate",
    "models pull",
    "models list",
    "models path",
    "k8s render",
    "k8s apply",
    "k8s status",
    "k8s diagnose",
    "k8s delete",
    "k8s role",
    "bench engine",
    "eval",
]


def test_help_imports_neither_torch_nor_ray() -> None:
    script = (
        "import sys\n"
        "from paceline.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('LOADED', sorted({'torch', 'ray', 'transformers', 'grpc'} & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "LOADED []"


def test_the_commands_are(run: Run) -> None:
    assert list(get_command(cli.app).commands) == [
        "serve",
        "chat",
        "status",
        "top",
        "doctor",
        "demo",
        "eval",
        "distill",
        "estimate",
        "leave",
        "models",
        "keys",
        "k8s",
        "bench",
        "autoscale",
        "cluster",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(run: Run, command: str) -> None:
    assert f"paceline {command}" in run(*command.split(), "--help").out.partition("Examples:")[2]


def test_version_is_the_installed_one(run: Run) -> None:
    assert run("--version").out == "paceline 0.1.0\n"


def test_an_unknown_option_exits_with_2(run: Run) -> None:
    assert run("serve", "--nonsense").code == 2


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """An application with a command for each way to fail."""
    broken = typer.Typer(pretty_exceptions_enable=False)

    @broken.command("model")
    def model() -> None:
        raise ModelError("no such model; try another")

    @broken.command("interrupt")
    def interrupt() -> None:
        raise KeyboardInterrupt

    @broken.command("bug")
    def bug() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    return broken


def test_our_error_is_one_line_on_stderr(run: Run, failing: typer.Typer) -> None:
    assert run("model").err == "error: no such model; try another\n"


def test_our_error_exits_with_1(run: Run, failing: typer.Typer) -> None:
    assert run("model").code == 1


def test_ctrl_c_exits_with_130(run: Run, failing: typer.Typer) -> None:
    assert run("interrupt").code == 130


def test_ctrl_c_prints_no_traceback(run: Run, failing: typer.Typer) -> None:
    assert run("interrupt").err == ""


def test_a_bug_keeps_its_traceback(failing: typer.Typer) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["bug"])
