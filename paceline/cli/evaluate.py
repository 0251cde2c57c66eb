"""`paceline eval`: what a quantized or approximated configuration costs, on a text and on tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import Json, engine_settings
from paceline.config import DEFAULT_MODEL, EngineSettings
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.bench.evaluation import Reading
    from paceline.bench.quality import Estimate, Quality
    from paceline.engine.load import LoadedModel

EPILOG = """\b
Examples:
  paceline eval --set compute_dtype=int8
  paceline eval ./my-model --set kv_dtype=int8 --text book.txt --tokens 20000
  paceline eval ./my-model-awq --reference ./my-model --text ./docs
  paceline eval --set ctx_size=512 --decode 1 --tokens 2048
  paceline eval --tasks hellaswag,arc_easy --limit 200
"""
OWN_CODE = "its own code in float32"

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A known name, a folder, a .gguf file or a Hub id.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the engine to judge, as under target.engine; may be repeated.",
        show_default=False,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="NAME", help="The model to compare with, if another.", show_default="MODEL"),
]
ReferenceSet = Annotated[
    list[str] | None,
    typer.Option(
        "--reference-set",
        metavar="KEY=VALUE",
        help="Compare with our engine under such settings; may be repeated.",
        show_default="the model's own code in Transformers, eager, float32",
    ),
]
TextPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="PATH",
        help="A text file, or a folder of .txt, .md and .rst files; may be repeated.",
        show_default="Python's language reference, which every CPython has",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=2, help="The text's first tokens that are read.")]
Context = Annotated[int, typer.Option("--context", metavar="N", min=2, help="Tokens of one window.")]
Stride = Annotated[
    int,
    typer.Option(
        "--stride", metavar="N", min=1, help="Tokens of a window that are scored; the others are only before them."
    ),
]
Decode = Annotated[
    int | None,
    typer.Option(
        "--decode",
        metavar="ROWS",
        min=1,
        help="Compute what is scored so many tokens a step, as decoding (1) and verification (more) do; by default in "
        "prefill chunks.",
        show_default=False,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="lm-eval's tasks, separated by commas, in place of a text, or beside --text; their data must be here.",
        show_default=False,
    ),
]
TasksPath = Annotated[
    Path | None,
    typer.Option("--tasks-path", metavar="DIR", help="A folder of task YAML files of your own.", show_default=False),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Documents of each task; all of them by default."),
]


def evaluate(
    model: ModelName = DEFAULT_MODEL,
    text: TextPaths = None,
    settings: Set = None,
    reference: Reference = None,
    reference_settings: ReferenceSet = None,
    tokens: Tokens = 8192,
    context: Context = 1024,
    stride: Stride = 512,
    decode: Decode = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """What quantizing or approximating a model costs.

    Reads a text with MODEL as it would be served under the settings given with --set, and with the reference: the same
    tokens in the same windows. Prints both perplexities, the KL divergence of the candidate from the reference, how
    often both like the same token best, and the standard error of each.
    """
    from paceline.bench.evaluation import Reading
    from paceline.bench.quality import check_windows
    from paceline.bench.text import read_text

    chosen = engine_settings(settings or (), "--set")
    other = engine_settings(reference_settings, "--reference-set") if reference_settings else None
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    check_windows(context, stride)
    reading = Reading(read_text(text or ()), tokens, context, stride, decode) if text or not names else None
    if names:
        _require_lm_eval()
    try:
        loaded = _load(model, chosen, None if names else context)
        report: dict[str, Any] = {"model": model, "settings": _named(chosen)}
        if reading is not None:
            report |= _on_text(loaded, reference or model, other, reading, as_json)
        if names:
            report["tasks"] = _on_tasks(loaded, names, tasks_path, decode, limit, as_json)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report, indent=2))


def _load(model: str, settings: EngineSettings, context: int | None) -> LoadedModel:
    from paceline.bench.evaluation import load_candidate

    return load_candidate(_fetched(model), settings, context)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError("--tasks: needs lm-eval (pip install 'paceline[eval]')", param="tasks") from None


def _fetched(name: str) -> Path:
    from rich.console import Console

    from paceline.cli.progress import model_progress
    from paceline.models import resolve

    with model_progress(Console(stderr=True)) as progress:
        return resolve(name, progress=progress).path


def _named(settings: EngineSettings) -> dict[str, Any]:
    """The settings that were given."""
    return settings.model_dump(exclude_unset=True)


def _in_words(settings: EngineSettings) -> str:
    return ", ".join(f"{key} {value}" for key, value in _named(settings).items()) or "default settings"


def _on_text(
    loaded: LoadedModel, name: str, settings: EngineSettings | None, reading: Reading, as_json: bool
) -> dict[str, Any]:
    """Compares with the reference of that name, shows the table unless the report is all that is wanted, and returns
    the report."""
    from paceline.bench.evaluation import Reference, compare_on_text

    reference = Reference(_fetched(name), settings)
    with _bar("reading") as on_scored:
        quality = compare_on_text(loaded, reference, reading, on_scored)
    report = {
        "choices": {choice.name: choice.value for choice in loaded.choices},
        "reference": f"{name}, {OWN_CODE if settings is None else _in_words(settings)}",
        "text": reading.text.name,
        "context": reading.context,
        "stride": reading.stride,
        "decode": reading.rows,
        **asdict(quality),
    }
    if not as_json:
        _show_quality(report, quality)
    return report


def _show_quality(report: dict[str, Any], quality: Quality) -> None:
    from rich import box
    from rich.table import Table

    from paceline.cli.console import stdout

    console = stdout()
    lines = [
        "; ".join(f"{name} {value}" for name, value in report["choices"].items()),
        f"against {report['reference']}",
        f"{report['text']}: {quality.tokens} tokens scored, {quality.windows} windows of {report['context']} tokens",
    ]
    for line in lines:
        console.print(line, style="dim", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what")
    for name in ("value", "± standard error"):
        table.add_column(name, justify="right")
    for name, estimate, form, scale in (
        ("perplexity, reference", quality.p_perplexity, "{:.3f}", 1),
        ("perplexity", quality.q_perplexity, "{:.3f}", 1),
        ("change of perplexity", quality.change, "{:+.3f}%", 100),
        ("KL(reference‖candidate), nats a token", quality.kl, "{:.2e}", 1),
        ("the same likeliest token", quality.agreement, "{:.2f}%", 100),
    ):
        table.add_row(name, form.format(scale * estimate.value), _error(estimate, form, scale))
    table.add_row("99th percentile of KL", f"{quality.kl_p99:.2e}", "")
    console.print(table)


def _error(estimate: Estimate, form: str, scale: float) -> str:
    return "" if estimate.error is None else form.replace("+", "").format(scale * estimate.error)


def _on_tasks(
    loaded: LoadedModel, names: list[str], folder: Path | None, rows: int | None, limit: int | None, as_json: bool
) -> list[dict[str, Any]]:
    from rich import box
    from rich.table import Table

    from paceline.bench.lm_tasks import run_tasks
    from paceline.cli.console import stdout

    with _bar("requests") as on_request:
        found = run_tasks(loaded, names, folder, rows=rows, limit=limit, on_request=on_request)
    if not as_json:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("task")
        table.add_column("metric")
        for name in ("value", "± standard error"):
            table.add_column(name, justify="right")
        for one in found:
            table.add_row(one.task, one.metric, f"{one.value:.4f}", "" if one.error is None else f"{one.error:.4f}")
        stdout().print(table)
    return [asdict(one) for one in found]


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, nothing in a log; call it with what is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
