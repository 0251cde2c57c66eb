"""`paceline models`: fetch, list and locate models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from paceline.cli.options import group
from paceline.errors import PacelineError

PULL_EPILOG = """\b
Examples:
  paceline models pull smollm2-135m
  paceline models pull ./Qwen3-0.6B-Q8_0.gguf
  paceline models pull Qwen/Qwen3-0.6B
"""

LIST_EPILOG = """\b
Examples:
  paceline models list
"""

PATH_EPILOG = """\b
Examples:
  paceline models path smollm2-135m
  ls -lh "$(paceline models path smollm2-135m)"
"""

models_app = group("Fetch, list and locate models.")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A known name, a .gguf file, a folder or a Hub id.", show_default=False)
]


@models_app.command("pull", epilog=PULL_EPILOG)
def pull(name: Name) -> None:
    """Fetch a model and make it ready to load.

    NAME is a name from `paceline models list`, a .gguf file, a model folder or a Hub id (owner/name).

    An interrupted pull goes on where it stopped; of a model that is ready nothing is fetched.
    """
    from rich.console import Console

    from paceline.cli.progress import model_progress
    from paceline.models import resolve

    with _ending(f"interrupted; resume with the same command: paceline models pull {name}"):
        with model_progress(Console(stderr=True)) as progress:
            files = resolve(name, progress=progress)
        typer.echo(f"{files.name} is ready: {files.path}")


@models_app.command("list", epilog=LIST_EPILOG)
def list_models() -> None:
    """List known models and converted .gguf files.

    Shows their state and size on disk; for what is not there, the size of the download.

    Models from the Hub stay in the Hub's own cache: `hf cache ls` lists those.
    """
    from paceline.models import ModelState, cached, catalogue

    with _ending("interrupted"):
        entries = {entry.name: entry for entry in catalogue()}
        rows = [("NAME", "STATE", "SIZE", "PATH OR DESCRIPTION")]
        for model in cached():
            entry = entries.get(model.name)
            if entry is None or model.state is ModelState.READY:
                size, what = model.size, str(model.path)
            else:
                size, what = entry.source.wheel_size, f"{entry.description}; {entry.licence}"
            state = "not pulled" if model.state is ModelState.ABSENT else str(model.state)
            rows.append((model.name, state, f"{size / 1e6:.0f} MB", what))
        _print_columns(rows)


@models_app.command("path", epilog=PATH_EPILOG)
def path(name: Name) -> None:
    """Print the folder of a model that is ready. Fetches nothing."""
    from paceline.models import resolve

    with _ending("interrupted"):
        typer.echo(resolve(name, download=False).path)


def _print_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Left-aligned columns, never cut: the last one is a path someone may want to copy."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _ending(interrupted: str) -> Iterator[None]:
    """Our errors: one line on stderr, exit 1. Ctrl-C: one line, exit 130."""
    try:
        yield
    except PacelineError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from None
