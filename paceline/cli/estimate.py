"""`paceline estimate`: what a model takes of memory at each precision, and how many sessions fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paceline.cli import options
from paceline.errors import ConfigError, ModelError
from paceline.models.estimate import GIB, Footprint, Load, ModelShape, fit, footprint, together
from paceline.models.precisions import DEVICES, Device, Precision, precision_named, precisions

if TYPE_CHECKING:
    from paceline.bench.footprint import Measured

EPILOG = """\b
Examples:
  paceline estimate smollm2-135m
  paceline estimate meta-llama/Llama-3.1-8B --gpu-memory 80 --context 8192,32768
  paceline estimate meta-llama/Llama-3.1-70B --gpu-memory 80 --tensor-parallel-size 4
  paceline estimate ./config.json --gpu-memory 24 --precision bnb-4bit --kv-dtype int8
  paceline estimate smollm2-135m --draft smollm2-135m-draft --memory 4 --json
  paceline estimate smollm2-135m --precision int8 --measure
"""

CONTEXTS = (2048, 8192, 32768)
MEASURED_BY_DEFAULT: dict[Device, str] = {"cuda": "bf16", "cpu": "fp16"}
MEASURED_PROMPT, MEASURED_TOKENS = 448, 60
"""A short prompt, and an answer of as many tokens as published peaks are measured with."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A known name, a folder, a .gguf file, a Hub id or a config.json; weights are not read.",
        show_default=False,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", metavar="MODEL", help="A draft in the same process and precision.", show_default=False),
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory", metavar="GIB", min=0.01, help="Memory of a GPU; by default this machine's.", show_default=False
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="GIB",
        min=0.01,
        help="Memory of a machine without a GPU; by default this one's, if no GPU is visible.",
        show_default=False,
    ),
]
Context = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        metavar="N[,N…]",
        help="Tokens of one session; may be repeated.  [default: 2048,8192,32768, as far as the model goes]",
        show_default=False,
    ),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        metavar="NAME[,NAME…]",
        help="fp32, bf16, bnb-8bit, bnb-4bit, torchao-int8, bnb-4bit-dq on a GPU; fp32, fp16, int8, int4, bnb-8bit, "
        "bnb-4bit, torchao-int8 on a CPU.  [default: all]",
        show_default=False,
    ),
]
KVDtype = Annotated[Literal["auto", "int8"], typer.Option("--kv-dtype", help="What the KV cache stores.")]
Ranks = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", metavar="N", min=1, help="Ranks that share the model: sizes the one with most of it."
    ),
]
Rows = Annotated[
    int,
    typer.Option("--max-batched-tokens", metavar="N", min=1, help="Tokens in one step: engine.max_batched_tokens."),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Load the model at one precision, answer a prompt and compare.")
]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: models, the first is the target; where they run; which precisions and contexts."""

    model: str
    shapes: tuple[ModelShape, ...]
    device: Device
    memory: int
    precisions: tuple[Precision, ...]
    contexts: tuple[int, ...]
    rows: int
    kv_int8: bool
    ranks: int = 1

    def load(self, context: int) -> Load:
        """Every running sequence may have logits for a window of candidates."""
        engine, speculation = options.DEFAULTS.target.engine, options.DEFAULTS.speculation
        sampled = min(self.rows, engine.max_num_seqs * (1 + speculation.max_depth))
        return Load(context, self.rows, sampled, self.kv_int8)

    def parts(self, precision: Precision) -> list[Footprint]:
        """Target and draft with one session of the first context."""
        step, context = self.load(self.contexts[0]).step, self.contexts[0]
        return [footprint(shape, precision, step, context, kv_int8=self.kv_int8) for shape in self.shapes]


def estimate(
    model: Model,
    draft: Draft = None,
    gpu_memory: GpuMemory = None,
    memory: Memory = None,
    context: Context = None,
    precision: Precisions = None,
    kv_dtype: KVDtype = "auto",
    max_batched_tokens: Rows = options.DEFAULTS.target.engine.max_batched_tokens,
    tensor_parallel_size: Ranks = 1,
    measure: Measure = False,
    as_json: options.Json = False,
) -> None:
    """Say what a model takes of memory, and how many sessions fit.

    From the configuration alone: weights at each precision, KV a token and a session, activations, a draft. Sizes one
    machine or GPU; docs/memory.md says how to read it.
    """
    from paceline.cli.console import stdout
    from paceline.cli.estimate_tables import show

    device, size = _memory(gpu_memory, memory)
    names = _listed(precision)
    chosen = tuple(precision_named(name, device) for name in names) if names else precisions(device)
    if measure:
        chosen = _one_precision(names, device)
        _refuse_ranks(tensor_parallel_size)
        _refuse_without_weights(model)
    shapes = (_shape(model, tensor_parallel_size), *([_shape(draft)] if draft is not None else []))
    contexts = _contexts(context, shapes[0].max_model_len)
    asked = Question(
        model, shapes, device, size, chosen, contexts, max_batched_tokens, kv_dtype == "int8", tensor_parallel_size
    )
    compared = _compare(asked) if measure else None
    if as_json:
        print(json.dumps(report(asked, compared), indent=2))
    else:
        show(stdout(), asked, compared)


def _memory(gpu_memory: float | None, memory: float | None) -> tuple[Device, int]:
    """What is sized, and its bytes."""
    if gpu_memory is not None and memory is not None:
        raise ConfigError("--gpu-memory, --memory: give the one the model runs in", param="memory")
    if gpu_memory is not None:
        return "cuda", int(gpu_memory * GIB)
    if memory is not None:
        return "cpu", int(memory * GIB)
    from paceline.cli.hardware import read_gpus, read_memory

    gpus = read_gpus()
    return ("cuda", gpus[0].memory) if gpus else ("cpu", read_memory().total)


def _listed(given: Sequence[str] | None) -> list[str]:
    """The items of comma lists, those of a repeated option together."""
    return [item for part in given or () for item in part.split(",") if item]


def _contexts(given: Sequence[str] | None, own: int) -> tuple[int, ...]:
    items = _listed(given)
    if not items:
        return tuple(each for each in CONTEXTS if each <= own) or (own,)
    if wrong := [item for item in items if not item.isdecimal() or int(item) == 0]:
        raise ConfigError(f"--context: {wrong[0]!r} is no number of tokens", param="context")
    return tuple(sorted({int(item) for item in items}))


def _one_precision(names: Sequence[str], device: Device) -> tuple[Precision, ...]:
    if len(names) > 1:
        raise ConfigError("--measure: loads the model once; give one --precision", param="measure")
    return (precision_named(names[0] if names else MEASURED_BY_DEFAULT[device], device),)


def _refuse_without_weights(model: str) -> None:
    if model.endswith(".json"):
        raise ModelError(f"{model}: a configuration alone; --measure loads weights: give a folder, a file or a name")


def _refuse_ranks(ranks: int) -> None:
    if ranks > 1:
        raise ConfigError(
            "--measure: loads the model in one process; leave out --tensor-parallel-size", param="measure"
        )


def _shape(name: str, ranks: int = 1) -> ModelShape:
    from rich.console import Console

    from paceline.cli.progress import model_progress
    from paceline.engine.shape import model_shape
    from paceline.models.configs import find_config

    with model_progress(Console(stderr=True)) as progress:
        found = find_config(name, progress=progress)
        return model_shape(found.config, found.folder, ranks=ranks)


@dataclass(frozen=True, slots=True)
class Compared:
    """One model, loaded: what was expected of it and what it took, in bytes."""

    precision: Precision
    expected: Footprint
    measured: Measured
    kv_bytes_per_token: int

    @property
    def lines(self) -> list[tuple[str, int, int]]:
        """Name, estimate, measured."""
        return [
            ("weights", self.expected.weights, self.measured.weights),
            ("KV a token", self.kv_bytes_per_token, self.measured.kv_bytes_per_token),
            ("peak", self.expected.peak, self.measured.peak),
        ]


def _compare(asked: Question) -> Compared:
    """The target alone, in a process of its own."""
    from rich.console import Console

    from paceline.bench.footprint import measure
    from paceline.cli.progress import model_progress
    from paceline.models import resolve

    (precision,), shape = asked.precisions, asked.shapes[0]
    settings = {
        **precision.settings,
        "device": asked.device,
        "kv_tokens": 2 * (MEASURED_PROMPT + MEASURED_TOKENS),
        "kv_dtype": "int8" if asked.kv_int8 else "auto",
        "max_batched_tokens": asked.rows,
    }
    with model_progress(Console(stderr=True)) as progress:
        path = resolve(asked.model, progress=progress).path
        with progress.task(f"loading {asked.model} in {precision.name}"):
            found = measure(Path(path), settings, MEASURED_PROMPT, MEASURED_TOKENS)
    step = Load(found.tokens, found.rows, 1, asked.kv_int8).step
    expected = footprint(shape, precision, step, found.tokens, kv_int8=asked.kv_int8)
    token = shape.kv.bytes_per_token(precision.activation, int8=asked.kv_int8)
    return Compared(precision, expected, found, token)


def report(asked: Question, compared: Compared | None) -> dict[str, Any]:
    """All of it for programs; sizes in bytes."""
    found: dict[str, Any] = {
        "model": asked.model,
        "shapes": [asdict(shape) | {"sharing": shape.kv.sharing} for shape in asked.shapes],
        "device": DEVICES[asked.device],
        "memory": asked.memory,
        "max_batched_tokens": asked.rows,
        "tensor_parallel_size": asked.ranks,
        "precisions": [_precision_report(asked, precision) for precision in asked.precisions],
    }
    if compared is not None:
        lines = {name: {"estimate": expected, "measured": taken} for name, expected, taken in compared.lines}
        found["measured"] = {"precision": compared.precision.name, **lines}
    return found


def _precision_report(asked: Question, precision: Precision) -> dict[str, Any]:
    parts = asked.parts(precision)
    whole = together(parts)
    return {
        "name": precision.name,
        "settings": dict(precision.settings),
        "kv_bytes_per_token": [
            shape.kv.bytes_per_token(precision.activation, int8=asked.kv_int8) for shape in asked.shapes
        ],
        "parts": [asdict(part) | {"peak": part.peak} for part in parts],
        "peak": whole.peak,
        "fits": [asdict(fit(asked.shapes, precision, asked.load(each), asked.memory)) for each in asked.contexts],
    }
