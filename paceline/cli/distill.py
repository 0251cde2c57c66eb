"""`paceline distill`: make a draft for a model."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.config import DEFAULT_MODEL
from paceline.errors import ConfigError
from paceline.types import MAX_SEED

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.distill.run import Outcome, Report, Settings

EPILOG = """\b
Examples:
  paceline distill --out ./my-draft
  paceline distill --target ./my-model --out ./my-draft --minutes 30 --prompts prompts.txt
  paceline distill --out ./my-draft --size medium --size kept=12288,hidden=384,layers=6 --try-recipes
"""

Target = Annotated[
    str, typer.Option("--target", metavar="NAME", help="The model to draft for: a known name, a folder, a Hub id.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the draft; made, or gone on from.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts to write text for, one a line, or .jsonl with a field `prompt`; by default built-in ones.",
        show_default=False,
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        metavar="FILE",
        help="Prompts to measure on and never to train on: JSON, category to list of texts, or one a line; "
        "by default some of the prompts.",
        show_default=False,
    ),
]
Minutes = Annotated[float, typer.Option("--minutes", metavar="M", min=0.01, help="Time for all of it.")]
Size = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        metavar="SIZE",
        help="auto, tiny, small, medium, large, or values such as kept=16384,hidden=384,layers=5,mlp=1024,kv_heads=2. "
        "Several are tried, the best is trained.  [default: auto, by what this machine is worth]",
        show_default=False,
    ),
]
TryRecipes = Annotated[
    bool, typer.Option("--try-recipes", help="Try several losses and learning rates for a moment first.")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=MAX_SEED, help="Of text, weights and order.")]


def distill(
    out: Out,
    target: Target = DEFAULT_MODEL,
    prompts: Prompts = None,
    held_out: HeldOut = None,
    minutes: Minutes = 10.0,
    size: Size = None,
    try_recipes: TryRecipes = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Make a draft: a small model that guesses what a target will say.

    The target writes text, a small Llama over its most frequent tokens is trained on the target's distribution there,
    and its acceptance is measured on prompts held out, greedy and at temperature 0.8. DIR then holds the weights
    (int8), the config and a model card, and is what `draft.model` or `LLM(draft=…)` take.

    Interrupted, the same command goes on where it stopped.
    """
    from rich.console import Console

    from paceline.cli.console import stdout
    from paceline.cli.progress import model_progress
    from paceline.distill.run import distill as run
    from paceline.models import resolve

    settings = read_settings(target, prompts, held_out, minutes, size or [], try_recipes, device, seed)
    try:
        with model_progress(Console(stderr=True)) as progress:
            files = resolve(target, progress=progress)
        with reporting(Console(stderr=True)) as report:
            outcome = run(files.path, out, settings, report)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on from {out}", err=True)
        raise typer.Exit(130) from None
    show(stdout(), outcome)


def read_settings(
    target: str,
    prompts: Path | None,
    held_out: Path | None,
    minutes: float,
    size: list[str],
    try_recipes: bool,
    device: str,
    seed: int,
) -> Settings:
    """Options in the run's own terms. Raises ConfigError naming the option."""
    from paceline.distill.openings import read_prompts
    from paceline.distill.run import Settings
    from paceline.distill.shape import parse_size
    from paceline.distill.train import CANDIDATES, TrainSettings

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: {device!r}; give auto, cpu or cuda", param="device")
    shapes = [parse_size(one) for one in size]
    if None in shapes and len(shapes) > 1:
        raise ConfigError("--size: auto stands alone", param="size")
    return Settings(
        target=target,
        minutes=minutes,
        seed=seed,
        device=device,
        sizes=tuple(shape for shape in shapes if shape is not None),
        recipes=CANDIDATES if try_recipes else (TrainSettings(),),
        prompts=tuple(read_prompts(prompts)) if prompts is not None else (),
        held_out=read_held_out(held_out) if held_out is not None else {},
        command=shlex.join(["paceline", *sys.argv[1:]]),
    )


def read_held_out(path: Path) -> dict[str, list[str]]:
    """By category; of a text file, all in one. Raises ConfigError."""
    from paceline.distill.openings import read_prompts

    if path.suffix != ".json":
        return {"prompts": read_prompts(path)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): [str(text) for text in texts] for name, texts in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--held-out: {path}: {error}", param="held_out") from None


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """Bars on a terminal; in a log a line for each phase and at most one every few seconds."""
    import time

    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.text import Text

    if not console.is_terminal:
        last: dict[str, float] = {}

        def line(phase: str, fraction: float, remark: str) -> None:
            now = time.monotonic()
            if fraction >= 1.0 or phase == "trying" or now - last.get(phase, -1e9) >= 10:
                console.print(Text(f"{phase} {fraction:4.0%} {remark}"), soft_wrap=True)
                last[phase] = now

        yield line
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(phase: str, fraction: float, remark: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=1.0, remark=remark)
            bars.update(tasks[phase], completed=fraction, remark=remark)

        yield bar


def show(console: Console, outcome: Outcome) -> None:
    """Acceptance by category, expected speed-up by depth, where the draft is."""
    from rich import box
    from rich.table import Table

    from paceline.distill import plan

    for temperature, found in outcome.acceptance.items():
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        table = Table(title=f"tokens a verification step, {title}", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("prompts")
        for name in ("outputs", "same token", *(f"depth {k}" for k in (1, 2, 4, 6, 8))):
            table.add_column(name, justify="right")
        for name, one in found.items():
            rates = [f"{one.tokens_per_step[k]:.2f}" for k in (1, 2, 4, 6, 8)]
            table.add_row(name, str(one.continuations), f"{one.agreement:.3f}", *rates)
        console.print(table)
    table = Table(title="expected on this machine", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("depth", "tokens a step", "speed-up", "draft elsewhere"):
        table.add_column(name, justify="right")
    for gain in outcome.gains:
        table.add_row(str(gain.depth), f"{gain.tokens_per_step:.2f}", f"{gain.speedup:.2f} x", f"{gain.aside:.2f} x")
    console.print(table)
    best, costs = plan.best(outcome.gains), outcome.costs
    advice = f"depth {best.depth}" if best.speedup > 1.0 else "no speculation: it would not be faster"
    console.print(
        f"a target step takes {costs.window(1):.2f} ms, a draft step {costs.draft:.2f} ms; recommended here: {advice}",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"{outcome.path} is ready: use it as draft.model, or LLM(draft=…)", markup=False, soft_wrap=True)
