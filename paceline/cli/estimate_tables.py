"""How an estimate looks: tables of memory, KV and sessions, and what to know when reading them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from paceline.models.estimate import GIB, PROCESS, fit, together
from paceline.models.precisions import DEVICES

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.cli.estimate import Compared, Question

MIB = 2**20


def show(console: Console, asked: Question, compared: Compared | None) -> None:
    """The tables, and below them what does not fit into columns."""
    shape = asked.shapes[0]
    head = f"{asked.model}: {shape.family}, {shape.parameters / 1e6:,.1f} million parameters"
    share = f" on the largest of {asked.ranks} ranks" if asked.ranks > 1 else ""
    console.print(f"{head}{share}, context {shape.max_model_len}", markup=False, soft_wrap=True)
    for table in (_memory_table(asked), _kv_table(asked), _sessions_table(asked)):
        console.print(table)
    for note in _notes(asked):
        console.print(f"- {note}", markup=False, soft_wrap=True)
    if compared is not None:
        console.print(_comparison(compared))


def size(count: int) -> str:
    """Bytes in the unit that shows three digits."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if count < 10 * unit else f"{count / unit:.1f} {name}"
    return f"{count} B"


def _table(title: str, *columns: str) -> Table:
    """The first column is a name, all others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _memory_table(asked: Question) -> Table:
    drafts = ["draft"] if len(asked.shapes) > 1 else []
    title = f"memory of one session of {asked.contexts[0]} tokens on a {DEVICES[asked.device]}"
    columns = ["weights", *drafts, "KV", "activations", "working", "libraries", "running", "loading"]
    table = _table(title, "precision", *columns)
    for precision in asked.precisions:
        parts = asked.parts(precision)
        whole = together(parts)
        weights = [part.weights for part in parts]
        rest = (whole.kv, whole.activations, whole.working, whole.libraries, whole.running, whole.loading)
        table.add_row(precision.name, *(size(count) for count in (*weights, *rest)))
    return table


def _kv_table(asked: Question) -> Table:
    table = _table("KV cache", "heads", "stored as", "a token", *(f"{each} tokens" for each in asked.contexts))
    for name, shape in zip(("target", "draft"), asked.shapes, strict=False):
        kv = shape.kv
        for itemsize in sorted({precision.activation for precision in asked.precisions}):
            stored = "int8" if asked.kv_int8 else f"{8 * itemsize} bits"
            token = kv.bytes_per_token(itemsize, int8=asked.kv_int8)
            heads = f"{name}: {kv.sharing}, {kv.heads} of queries on {kv.kv_heads}"
            table.add_row(heads, stored, size(token), *(size(token * each) for each in asked.contexts))
            if asked.kv_int8:
                break  # the same whatever the activations are
    return table


def _sessions_table(asked: Question) -> Table:
    title = f"sessions that fit into {size(asked.memory)}"
    table = _table(title, "precision", *(f"of {each} tokens" for each in asked.contexts), "KV tokens in all")
    for precision in asked.precisions:
        fits = [fit(asked.shapes, precision, asked.load(each), asked.memory) for each in asked.contexts]
        counts = [f"{one.sessions:,}" for one in fits]
        table.add_row(precision.name, *counts, f"{fits[-1].kv_tokens:,}")
    return table


def _notes(asked: Question) -> Iterator[str]:
    shape, cuda = asked.shapes[0], asked.device == "cuda"
    process = "a CUDA context" if cuda else "Python and its libraries"
    yield f"{size(PROCESS[asked.device])} for {process} are left out above and counted in the sessions."
    share = "0.8" if cuda else "a quarter"
    yield f"engine.kv_tokens: auto takes {share} of what is free when the model is loaded; a number may take more."
    if beyond := [each for each in asked.contexts if each > shape.max_model_len]:
        yield f"{beyond[0]} tokens are beyond the model's own {shape.max_model_len}."
    if shape.kv.sliding_layers:
        layers = f"{shape.kv.sliding_layers} of {shape.kv.layers} layers see the last {shape.kv.window} tokens only"
        yield f"{layers}; the KV cache keeps the keys and values of all tokens."
    if shape.quantized:
        yield f"Its checkpoint is quantized ({shape.quantized}); the tables say what its weights take if they are not."
    if shape.experts:
        kept = "bitsandbytes and torchao" if cuda else "our packed products and libraries"
        yield f"{shape.experts / 1e6:,.1f} million of its parameters are experts, which {kept} leave as they are."
    if not cuda:
        lean = "the lean pass, product by product" if shape.lean else "its own code, loaded whole in float32"
        yield f"Runs by {lean}; over a library's modules (bnb, torchao) by its own code in any case."
        yield "engine.linear_backend: auto takes of fp32, fp16, int8 and int4 what keeps the checkpoint's numbers."


def _comparison(compared: Compared) -> Table:
    table = _table(f"loaded in {compared.precision.name}", "", "estimate", "measured", "difference")
    for name, expected, measured in compared.lines:
        table.add_row(name, size(expected), size(measured), f"{expected / measured - 1:+.1%}")
    return table
