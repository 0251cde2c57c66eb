"""The `paceline` command: its subcommands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from paceline.cli import chat, demo, distill, doctor, estimate, evaluate, leave, serve, status, top
from paceline.cli.autoscale import autoscale_app
from paceline.cli.bench import bench_app
from paceline.cli.k8s import k8s_app
from paceline.cli.keys import keys_app
from paceline.cli.launcher import cluster_app
from paceline.cli.models import models_app
from paceline.cli.options import group
from paceline.errors import PacelineError

EPILOG = """\b
Examples:
  paceline demo
  paceline serve --targets 2 --drafts 2
  paceline chat "What is the capital of France?"
"""

NOISY = ("torchao", "torch.utils._pytree")
"""Transformers imports torchao wherever it is installed, and that warns of GPU kernels it has no use for here."""

app = group("Serve language models with a pool of drafters riding ahead.", EPILOG)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("chat", epilog=chat.EPILOG)(chat.chat)
app.command("status", epilog=status.EPILOG)(status.status)
app.command("top", epilog=top.EPILOG)(top.top)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("distill", epilog=distill.EPILOG)(distill.distill)
app.command("estimate", epilog=estimate.EPILOG)(estimate.estimate)
app.command("leave", epilog=leave.EPILOG)(leave.leave)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(k8s_app, name="k8s")
app.add_typer(bench_app, name="bench")
app.add_typer(autoscale_app, name="autoscale")
app.add_typer(cluster_app, name="cluster")


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"paceline {installed_version('paceline')}")
        raise typer.Exit


@app.callback()
def top_level(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Serve language models with a pool of drafters riding ahead."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error in one line, 2 wrong usage, 130 Ctrl-C."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(arguments)
    except PacelineError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(1)
