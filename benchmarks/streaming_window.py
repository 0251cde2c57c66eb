"""A session that never ends: what a token costs after 20,000 of them, and what the window costs in perplexity.

    python benchmarks/streaming_window.py                                # 20,000 tokens of smollm2-135m, about 20 min
    python benchmarks/streaming_window.py --tokens 3000                  # a look
    python benchmarks/streaming_window.py --ctx-size 1024 --n-discard 64 --kv-dtype int8
    python benchmarks/streaming_window.py --part perplexity --out /tmp/window

*Speed* generates that many tokens with one session and reports, for each thousand, the median time of a token and what
the process takes. A young session, begun anew with each thousand, takes a step after each step of the endless one, so
that a machine that varies does so for both. It fails if the last thousand is more than 10% from the second in time, by
the young session's, or 2% above it in memory.

*Perplexity* reads that many tokens of the Python reference manual in three ways: under the streaming window; with keys
and values of the same tokens computed from scratch at every shift; under a window that keeps no first tokens. It fails
if the first is more than 5% worse than the second.

Writes streaming_window.json, and streaming_window.png if matplotlib is there (the extra `bench`), to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.engine import Engine
from paceline.engine.load import LoadedModel, load_model
from paceline.models import resolve
from paceline.sessions.window import StreamingWindow
from paceline.types import Request, SamplingParams

BLOCK = 1000
PROMPT_TOKENS = 64
MAX_SLOWDOWN = 0.10
MAX_GROWTH = 0.02
MAX_LOSS = 0.05
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Block:
    """A thousand generated tokens: milliseconds of one (median, mean, longest; the median of the young session beside
    it), and the process's memory after them."""

    end: int
    median_ms: float
    young_ms: float
    mean_ms: float
    longest_ms: float
    rss_mb: float


def main() -> int:
    options = _options()
    settings = EngineSettings(
        device="cpu",
        kv_tokens=max(4096, 2 * options.ctx_size),
        kv_dtype=options.kv_dtype,
        **({} if options.threads is None else {"threads": options.threads}),
    )
    model = load_model(resolve(options.model).path, settings)
    window = StreamingWindow(options.ctx_size, options.n_keep, options.n_discard)
    print(f"{options.model}: " + ", ".join(f"{choice.name} {choice.value}" for choice in model.choices))
    print(window)
    found: dict[str, Any] = {"model": options.model, "window": asdict(window), "tokens": options.tokens}
    good = True
    if options.part != "perplexity":
        blocks = speed(model, window, options.tokens, options.seed)
        found["speed"] = [asdict(block) for block in blocks]
        good &= _report_speed(blocks)
    if options.part != "speed":
        losses = perplexity(model, window, options.tokens)
        found["losses"] = losses
        good &= _report_perplexity(losses, window)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "streaming_window.json").write_text(json.dumps(found, indent=1) + "\n")
    _plot(found, options.out / "streaming_window.png")
    return int(not good)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a name, folder or file")
    parser.add_argument("--tokens", type=int, default=20_000, help="generated, and read (default 20000)")
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--n-keep", type=int, default=4)
    parser.add_argument("--n-discard", type=int, default=-1)
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "int8"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("speed", "perplexity", "both"), default="both")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and the plot")
    return parser.parse_args()


def speed(model: LoadedModel, window: StreamingWindow, tokens: int, seed: int) -> list[Block]:
    """Plain decoding of one stream: every step is a token."""
    endless, process = _begun(model, window, tokens, seed), psutil.Process()
    blocks, produced = [], 0
    with _bar("generating", tokens) as advance:
        while endless.has_work:
            young = _begun(model, window, BLOCK, seed)
            times: list[float] = []
            beside: list[float] = []
            while endless.has_work and len(times) < BLOCK:
                times.append(_step_ms(endless))
                if young.has_work:
                    beside.append(_step_ms(young))
                advance(1)
            produced += len(times)
            rss = process.memory_info().rss / 2**20
            medians = statistics.median(times), statistics.median(beside)
            blocks.append(Block(produced, *medians, statistics.mean(times), max(times), rss))
    endless.check()
    return blocks


def _begun(model: LoadedModel, window: StreamingWindow, tokens: int, seed: int) -> Engine:
    """A session that has its first token and is to have so many more."""
    engine = model.engine()
    drawing: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": seed}
    params = SamplingParams(max_tokens=tokens + 1, ignore_eos=True, **drawing, **asdict(window))
    engine.add(Request("session", tuple(_text(model, PROMPT_TOKENS)), params))
    while not engine.step():
        pass
    return engine


def _step_ms(engine: Engine) -> float:
    began = time.perf_counter()
    engine.step()
    return 1e3 * (time.perf_counter() - began)


def perplexity(model: LoadedModel, window: StreamingWindow, tokens: int) -> dict[str, list[float]]:
    """Negative log likelihood of every token of a long text but the first, by how it is read."""
    ids = _text(model, tokens)
    without = StreamingWindow(window.ctx_size, 0, window.n_discard)
    ways: dict[str, Callable[[], Iterator[list[float]]]] = {
        "streaming window": lambda: _streamed(model, ids, window),
        "recomputed at every shift": lambda: _recomputed(model, ids, window),
        "window without sinks": lambda: _streamed(model, ids, without),
    }
    found = {}
    for name, read in ways.items():
        losses: list[float] = []
        with _bar(name, len(ids) - 1) as advance:
            for some in read():
                losses += some
                advance(len(some))
        found[name] = losses
    return found


def _streamed(model: LoadedModel, ids: list[int], window: StreamingWindow) -> Iterator[list[float]]:
    kv = model.engine().kv
    entry = kv.reserve(ids, window.ctx_size, window=window)
    assert entry is not None
    while entry.length < len(ids):
        kv.shift(entry)
        chunk = ids[entry.length : entry.length + entry.left]
        logits = model.runner.run([Window(entry, chunk, sample=len(chunk))])
        yield _losses(logits, ids[entry.length + 1 : entry.length + 1 + len(chunk)])
        kv.append(entry, chunk)


def _recomputed(model: LoadedModel, ids: list[int], window: StreamingWindow) -> Iterator[list[float]]:
    """What the window holds after each shift, as a prompt of its own."""
    done = 0
    while done < len(ids):
        kv = model.engine().kv
        dropped = window.dropped(done + 1)
        held = ids[: window.n_keep] + ids[window.n_keep + dropped : done] if dropped else ids[:done]
        chunk = ids[done : window.edge(done + 1)]
        entry = kv.reserve([*held, *chunk], window.ctx_size)
        assert entry is not None
        if held:
            model.runner.run([Window(entry, held, sample=0)])
            kv.append(entry, held)
        logits = model.runner.run([Window(entry, chunk, sample=len(chunk))])
        yield _losses(logits, ids[done + 1 : done + 1 + len(chunk)])
        done += len(chunk)


def _losses(logits: torch.Tensor, following: list[int]) -> list[float]:
    """The text's last token is followed by nothing."""
    rows = logits[: len(following)].log_softmax(-1)
    found: list[float] = (-rows.gather(1, torch.tensor(following, dtype=torch.long)[:, None])[:, 0]).tolist()
    return found


def _text(model: LoadedModel, tokens: int) -> list[int]:
    """The longest chapters of the Python reference manual, end to end."""
    ids: list[int] = []
    for topic in sorted(pydoc_data.topics.topics.values(), key=len, reverse=True):
        ids += model.tokenizer.encode(topic)
        if len(ids) >= tokens:
            return ids[:tokens]
    return ids


def _report_speed(blocks: list[Block]) -> bool:
    print(f"\n{'tokens':>8s} {'median ms':>10s} {'young':>7s} {'mean ms':>8s} {'longest':>8s} {'RSS MB':>7s}")
    for block in blocks:
        print(
            f"{block.end:8d} {block.median_ms:10.2f} {block.young_ms:7.2f} {block.mean_ms:8.2f} "
            f"{block.longest_ms:8.1f} {block.rss_mb:7.1f}"
        )
    if len(blocks) < 3:
        print("too few tokens to compare")
        return True
    second, last = blocks[1], blocks[-1]
    slower = (last.median_ms / last.young_ms) / (second.median_ms / second.young_ms) - 1
    larger = last.rss_mb / second.rss_mb - 1
    good = abs(slower) <= MAX_SLOWDOWN and larger <= MAX_GROWTH
    print(f"last against second: {slower:+.1%} time, {larger:+.2%} memory: {'as promised' if good else 'FAILED'}")
    return good


def _report_perplexity(losses: dict[str, list[float]], window: StreamingWindow) -> bool:
    """Of the tokens behind the first shift; before it all ways are the same."""
    print()
    found = {name: math.exp(statistics.mean(each[window.ctx_size :] or each)) for name, each in losses.items()}
    for name, value in found.items():
        print(f"{name:28s} perplexity {value:10.2f}")
    worse = found["streaming window"] / found["recomputed at every shift"] - 1
    good = worse <= MAX_LOSS
    print(f"streaming against recomputed: {worse:+.1%}: {'as promised' if good else 'FAILED'}")
    return good


def _plot(found: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (the extra `bench`)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if "speed" in found:
        ends = [block["end"] for block in found["speed"]]
        left.plot(ends, [block["median_ms"] for block in found["speed"]], color="tab:blue", label="endless")
        left.plot(ends, [block["young_ms"] for block in found["speed"]], color="tab:cyan", label="young, beside it")
        left.legend(loc="lower right")
        left.set(xlabel="generated tokens", ylabel="ms a token (median of a thousand)")
        memory = left.twinx()
        memory.plot(ends, [block["rss_mb"] for block in found["speed"]], color="tab:gray", linestyle="--")
        memory.set(ylabel="RSS, MB (dashed)")
        for axes in (left, memory):
            axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        left.set_title("time and memory")
    for name, losses in found.get("losses", {}).items():
        starts = range(0, len(losses), BLOCK // 2)
        right.plot(starts, [math.exp(statistics.mean(losses[n : n + BLOCK // 2])) for n in starts], label=name)
    if "losses" in found:
        right.set(xlabel="position in the text", ylabel="perplexity (of 500 tokens)", yscale="log")
        right.axvline(found["window"]["ctx_size"], color="tab:gray", linewidth=0.8, linestyle=":")
        right.set_title("perplexity of the Python manual")
        right.legend()
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


class _bar:
    """A progress bar, and what moves it."""

    def __init__(self, name: str, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Advance:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


if __name__ == "__main__":
    sys.exit(main())
