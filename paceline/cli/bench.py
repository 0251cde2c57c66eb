"""`paceline bench`: the engine against its floor and against peers; speculation against plain decoding."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import group
from paceline.config import DEFAULT_DRAFT, DEFAULT_MODEL, ComputeDtype
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from paceline.bench.engine import EngineBench, Sizes
    from paceline.bench.measure import Figure
    from paceline.bench.peers import LlamaCppPeer, TransformersPeer
    from paceline.bench.quality import Quality

EPILOG = """\b
Examples:
  paceline bench engine
  paceline bench engine --quick --no-peers
  paceline bench engine --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json figures.json --plot figures.png
"""

SPECULATION_EPILOG = """\b
Examples:
  paceline bench speculation
  paceline bench speculation --quick
  paceline bench speculation --json figures.json --plot figures.png
"""
CURVE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

bench_app = group("Measure.")

ModelName = Annotated[str, typer.Option("--model", metavar="NAME", help="Model to measure.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all usable cores if not given.")]
Compute = Annotated[
    ComputeDtype, typer.Option("--compute-dtype", help="What activations are rounded to: engine.compute_dtype.")
]
DraftName = Annotated[
    str | None,
    typer.Option("--draft", metavar="NAME", help="Draft to measure on chat; the default model has one of its own."),
]
Gguf = Annotated[
    Path | None,
    typer.Option("--gguf", metavar="FILE", help="The same model for llama.cpp; without it that peer is left out."),
]
LlamaPython = Annotated[
    str | None,
    typer.Option("--llama-python", metavar="PYTHON", help="Interpreter with llama-cpp-python; this one if not given."),
]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Measure transformers and llama.cpp as well.")]
Quick = Annotated[bool, typer.Option("--quick", help="Few, short rounds: for a look, not for a report.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every value to FILE.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the rates; needs matplotlib.")]


@bench_app.command("engine", epilog=EPILOG)
def engine(
    model: ModelName = DEFAULT_MODEL,
    threads: Threads = None,
    compute_dtype: Compute = "auto",
    gguf: Gguf = None,
    llama_python: LlamaPython = None,
    peers: Peers = True,
    quick: Quick = False,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Throughput and latency of the engine alone, on this machine.

    Figures are medians over interleaved rounds, with their spread. Keep the machine quiet meanwhile.
    """
    import torch

    from paceline.bench.engine import EngineBench, Sizes, quality, settings
    from paceline.cli.cluster import fetch_models
    from paceline.cli.console import stdout
    from paceline.config import AppSettings
    from paceline.engine.load import load_model
    from paceline.models import resolve

    console = stdout()
    if gguf is not None and not gguf.is_file():
        raise ConfigError(f"--gguf: {gguf}: no such file", param="gguf")
    fetch_models(AppSettings(model=model), console)
    path = resolve(model).path
    sizes = Sizes.quick() if quick else Sizes()
    loaded = load_model(path, settings(threads, compute_dtype))
    for choice in loaded.choices:
        console.print(f"{choice.name}: {choice.value} ({choice.reason})", style="dim", markup=False)
    ours = EngineBench(loaded, sizes)
    steps = ours.step_figures()
    reference = _reference(path) if peers else None
    rates = _rates(ours, sizes, reference, gguf, llama_python or sys.executable, torch.get_num_threads())
    kl = quality(loaded, reference) if reference is not None else None
    console.print(_step_table(steps))
    console.print(_rate_table(rates))
    if kl is not None:
        console.print(
            f"against float32 over {kl.tokens} tokens of text: KL {kl.kl.value:.1e} nats a token, "
            f"perplexity {kl.q_perplexity.value:.3f} (float32: {kl.p_perplexity.value:.3f})",
            markup=False,
        )
    if json_file is not None:
        json_file.write_text(json.dumps(_report(model, steps, rates, kl), indent=2) + "\n")
    if plot_file is not None:
        _plot(rates, plot_file)


@bench_app.command("speculation", epilog=SPECULATION_EPILOG)
def speculation(
    model: ModelName = DEFAULT_MODEL,
    draft: DraftName = None,
    threads: Threads = None,
    compute_dtype: Compute = "auto",
    quick: Quick = False,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Speculation on this machine: prompt lookup on given texts and on chat, a draft on chat, and fixed depths against
    the adaptive one with synthetic acceptance.

    Figures are medians over interleaved rounds, with their spread. Keep the machine quiet meanwhile.
    """
    import tempfile

    from paceline.bench.engine import settings
    from paceline.bench.speculation import (
        Sizes,
        SpeculationBench,
        chat_prompts,
        grounded_prompts,
        synthetic_draft,
    )
    from paceline.cli.cluster import fetch_models
    from paceline.cli.console import stdout
    from paceline.config import AppSettings
    from paceline.engine.load import load_model
    from paceline.models import resolve

    console = stdout()
    if draft is None and model == DEFAULT_MODEL:
        draft = DEFAULT_DRAFT
    fetch_models(AppSettings(model=model), console)
    sizes = Sizes.quick() if quick else Sizes()
    drafting = None if draft is None else load_model(resolve(draft).path, settings(threads))
    loaded = load_model(resolve(model).path, settings(threads, compute_dtype))
    bench = SpeculationBench(loaded, sizes)
    curve = {rows: 1e3 * bench.cost.curve(rows) for rows in CURVE_ROWS}
    console.print("pass by rows, ms: " + ", ".join(f"{r}: {ms:.1f}" for r, ms in curve.items()), style="dim")
    figures = bench.answers("grounded", grounded_prompts()) | bench.answers("chat", chat_prompts(), drafting)
    if drafting is not None:
        figures |= bench.answers("chat at temperature 0.8", chat_prompts(), drafting, temperature=0.8)
    console.print(_against_plain("one stream", figures))
    with tempfile.TemporaryDirectory() as folder:
        random_draft = synthetic_draft(loaded, bench.cost.curve(1), Path(folder), threads)
        for batch in sizes.batches:
            found = bench.synthetic(batch, random_draft)
            console.print(_against_plain(f"synthetic acceptance, batch {batch}", found))
            figures |= found
    if json_file is not None:
        json_file.write_text(json.dumps(_report(model, {}, figures, None) | {"pass_ms": curve}, indent=2) + "\n")
    if plot_file is not None:
        _plot(figures, plot_file)


def _against_plain(title: str, figures: dict[str, Figure]) -> Table:
    """Rates, and their ratio to the plain one before them, round by round."""
    from statistics import median

    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what")
    for name in ("tokens/s", "least", "most", "of plain"):
        table.add_column(name, justify="right")
    plain: Figure | None = None
    for name, figure in figures.items():
        plain = figure if plain is None or name.endswith(("plain", "depth 0")) else plain
        ratio = median(value / base for value, base in zip(figure.values, plain.values, strict=True))
        table.add_row(name, *(f"{v:.1f}" for v in (figure.median, figure.low, figure.high)), f"{ratio:.2f} x")
    return table


def _reference(path: Path) -> Any:
    """The model in Transformers, eager, float32: the peer, and what quality is measured against."""
    import torch

    from paceline.models import load_causal_lm

    return load_causal_lm(path, dtype=torch.float32, device=torch.device("cpu"), attn_implementation="eager")


def _rates(
    ours: EngineBench, sizes: Sizes, reference: Any, gguf: Path | None, llama_python: str, threads: int
) -> dict[str, Figure]:
    """Tokens/s of everything, in interleaved rounds."""
    from contextlib import ExitStack

    from paceline.bench.engine import PROMPT, STREAMS
    from paceline.bench.measure import rounds
    from paceline.bench.peers import LlamaCppPeer, TransformersPeer, has_llama_cpp

    subjects: dict[str, Callable[[], float]] = {
        "decode, 1 stream": ours.decode,
        f"decode, 1 stream, context {PROMPT}": lambda: ours.decode(prompt=PROMPT),
        f"decode, {STREAMS} streams": lambda: ours.decode(STREAMS),
        f"prefill {PROMPT}": ours.prefill,
    }
    with ExitStack() as stack:
        if reference is not None:
            peer: TransformersPeer | LlamaCppPeer = TransformersPeer(reference, sizes.tokens, PROMPT)
            subjects |= _peer_subjects("transformers fp32", peer)
        if gguf is not None and has_llama_cpp(llama_python):
            peer = stack.enter_context(LlamaCppPeer(gguf, threads, sizes.tokens, PROMPT, llama_python))
            subjects |= _peer_subjects("llama.cpp", peer)
        return rounds(subjects, "tokens/s", sizes.repeats)


def _peer_subjects(name: str, peer: TransformersPeer | LlamaCppPeer) -> dict[str, Callable[[], float]]:
    from paceline.bench.engine import PROMPT

    return {f"{name}: decode": peer.decode, f"{name}: prefill {PROMPT}": peer.prefill}


def _step_table(steps: dict[str, Figure]) -> Table:
    from rich import box
    from rich.table import Table

    from paceline.bench.engine import CONTEXT

    table = Table(title=f"one step at context {CONTEXT}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("rows")
    for name in ("ms", "least", "most", "of its products"):
        table.add_column(name, justify="right")
    for name, figure in steps.items():
        products = steps.get(name.replace("step", "products"))
        ratio = f"{figure.median / products.median:.2f} x" if products and products is not figure else ""
        table.add_row(name, *(f"{v:.1f}" for v in (figure.median, figure.low, figure.high)), ratio)
    return table


def _rate_table(rates: dict[str, Figure]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title="tokens a second", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what")
    for name in ("median", "least", "most"):
        table.add_column(name, justify="right")
    for name, figure in rates.items():
        table.add_row(name, *(f"{v:.1f}" for v in (figure.median, figure.low, figure.high)))
    return table


def _report(model: str, steps: dict[str, Figure], rates: dict[str, Figure], kl: Quality | None) -> dict[str, Any]:
    from dataclasses import asdict

    from paceline.cli.hardware import read_cpu

    figures = {**steps, **rates}
    return {
        "model": model,
        "cpu": read_cpu().model,
        "python": platform.python_version(),
        "figures": {name: {"unit": f.unit, "median": f.median, "values": f.values} for name, f in figures.items()},
        "quality": None if kl is None else asdict(kl),
    }


def _plot(rates: dict[str, Figure], path: Path) -> None:
    """Horizontal bars of the medians, with the spread."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot: needs matplotlib (pip install 'paceline[bench]')", param="plot") from None
    names = list(rates)
    medians = [rates[name].median for name in names]
    spread = [[f.median - f.low for f in rates.values()], [f.high - f.median for f in rates.values()]]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1), layout="constrained")
    axes.barh(names, medians, xerr=spread, color="#3b7dd8", ecolor="#444444", capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second, median and range")
    axes.bar_label(axes.containers[1], labels=[f"{m:.0f}" for m in medians], padding=6)
    axes.margins(x=0.15)
    figure.savefig(path, dpi=150)
    plt.close(figure)
