"""Is a session's KV back from disk, or from host memory, sooner than it is computed? Three engines, by turns.

    python benchmarks/tiers.py                              # smollm2-135m, 2000 tokens, in the temporary folder
    python benchmarks/tiers.py --tokens 300 --repeats 1     # a look

A session of `--tokens` tokens has left the KV cache; its next turn adds 16. How long until the first token of the
answer, if the KV comes from disk (its file dropped from the page cache before), from disk through the page cache, from
host memory, and if everything is computed again? Medians of `--repeats` of each, one of each kind after the other.
Prints a table; `--json FILE` keeps the numbers. Fails if disk is not faster than computing. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paceline.config import EngineSettings, SessionSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.models import resolve
from paceline.types import Request, SamplingParams

NEW_TOKENS = 16
PACKED_S = 1.0
"""Enough for a background thread to copy a session into memory of its own size."""


class Chat:
    """One session and an engine that answers it with a token a turn."""

    def __init__(self, model: LoadedModel, tokens: int, settings: SessionSettings) -> None:
        self.engine = model.engine(sessions=settings)
        self._chance = random.Random(0)
        self._history = self._tokens(tokens)
        self.ask(self._history)

    def follow_up(self) -> tuple[float, int]:
        """Seconds to the first token of the next turn, and how many of its prompt were cached."""
        return self.ask((*self._history, *self._tokens(NEW_TOKENS)))

    def ask(self, prompt: tuple[int, ...]) -> tuple[float, int]:
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        began = time.perf_counter()
        self.engine.add(Request("turn", prompt, params, "session"))
        deltas = {}
        while not deltas:
            deltas = self.engine.step()
        took, metrics = time.perf_counter() - began, deltas["turn"].metrics
        assert metrics is not None
        return took, metrics.cached_tokens

    def put_away(self, tier: str | None) -> None:
        """Out of the KV cache; wait until the session is in that tier."""
        self.engine.kv.evict(self.engine.kv.usage().total)
        while tier is not None and [each.tier for each in self.engine.sessions()] != [tier]:
            time.sleep(0.01)
        time.sleep(PACKED_S)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._chance.randrange(1000, 20_000) for _ in range(count))


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = EngineSettings(device="cpu", kv_tokens=2 * options.tokens + 512, kv_dtype=options.kv_dtype)
    model = load_model(resolve(options.model).path, settings)
    on_disk = SessionSettings(kv_disk_path=str(folder), kv_tier_dtype=options.kv_tier_dtype)
    in_memory = SessionSettings(kv_host_gib=16.0, kv_tier_dtype=options.kv_tier_dtype)
    disk, host, plain = (Chat(model, options.tokens, each) for each in (on_disk, in_memory, SessionSettings()))
    kinds: dict[str, tuple[Chat, str | None, Callable[[], None]]] = {
        "computed": (plain, None, lambda: None),
        "disk": (disk, "disk", lambda: drop_from_page_cache(folder)),
        "disk, page cache": (disk, "disk", lambda: None),
        "host memory": (host, "host", lambda: None),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind, (chat, tier, prepare) in kinds.items():
            chat.put_away(tier)
            prepare()
            seconds, cached = chat.follow_up()
            if (cached >= options.tokens) is (tier is None):
                raise SystemExit(f"{kind}: {cached} of {options.tokens} tokens came from the cache")
            found[kind].append(seconds)
    return {
        "median_s": {kind: statistics.median(values) for kind, values in found.items()},
        "all_s": found,
        "file_bytes": max(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def table(results: dict[str, Any], tokens: int) -> str:
    median, computed = results["median_s"], results["median_s"]["computed"]
    rows = [f"| {kind} | {1000 * took:.0f} ms | {computed / took:.1f} |" for kind, took in median.items()]
    size = f"{tokens} tokens, {results['file_bytes'] / 1e6:.0f} MB on disk"
    return "\n".join([f"| KV of {size} | first token after | times as fast |", "|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--kv-tier-dtype", default="lossless")
    parser.add_argument("--folder", type=Path, help="on the disk in question")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(options, Path(folder))
    print(table(results, options.tokens))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(results["median_s"]["disk"] >= results["median_s"]["computed"])


if __name__ == "__main__":
    sys.exit(main())
