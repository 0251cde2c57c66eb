"""Ten thousand short requests through one engine: does the process grow?

    python benchmarks/soak.py                          # a tiny model, about a minute
    python benchmarks/soak.py --model smollm2-135m --requests 500

Sessions with follow-up turns, shared prefixes, priorities and cancellations are mixed. Prints the resident set
every tenth of the way and fails if it grew by more than `--max-growth-mb` after the warm-up: the first of these
points at which the KV cache is full, the second at the earliest, for the allocators' pools.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import sys
import time
from dataclasses import replace

import psutil
import torch

from paceline.config import EngineSettings
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.load import load_model
from paceline.engine.runner import ModelRunner
from paceline.models import resolve
from paceline.types import Request, SamplingParams

TINY_KV_TOKENS = 20_000
REAL_KV_TOKENS = 4_000
SESSIONS = 500
IN_FLIGHT = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name, folder or file; default a tiny random model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--max-growth-mb", type=float, default=20.0)
    options = parser.parse_args()
    engine, vocab = _real(options.model) if options.model else _tiny()
    grown = soak(engine, vocab, options.requests)
    print(f"grown by {grown:.1f} MB after warm-up; {options.max_growth_mb:g} allowed")
    return int(grown > options.max_growth_mb)


def soak(engine: Engine, vocab: int, count: int) -> float:
    """Run `count` requests; MB of resident set gained after the warm-up. Raises if there were too few to end it."""
    traffic, sizes, begun = Traffic(random.Random(0), vocab), [], time.perf_counter()
    warm = 1
    for number in range(count):
        while engine.num_running + engine.num_waiting >= IN_FLIGHT:
            engine.step()
        engine.add(traffic.request(number))
        if number % 10 == 9:
            engine.abort(str(number - traffic.random.randrange(10)))
        if (number + 1) % max(1, count // 10) == 0:
            while engine.has_work:
                engine.step()
            engine.check()
            sizes.append(resident_mb())
            usage = engine.kv.usage()
            if usage.cached < 0.9 * usage.total:
                warm = max(warm, len(sizes))
            print(
                f"{number + 1:6d} requests {time.perf_counter() - begun:6.1f} s  {sizes[-1]:7.1f} MB  "
                f"{usage.cached} KV tokens cached, {len(engine.kv.sessions())} sessions",
                flush=True,
            )
    if len(sizes) < warm + 2:
        raise SystemExit("too few requests: the KV cache was never full")
    return max(sizes[warm + 1 :]) - sizes[warm]


class Traffic:
    """Requests as chats make them: a system prompt all share, sessions that come back, a few that do not."""

    def __init__(self, source: random.Random, vocab: int) -> None:
        self.random, self._vocab = source, vocab
        self._system = self._tokens(40)
        self._history: dict[str, tuple[int, ...]] = {}

    def request(self, number: int) -> Request:
        session = f"s{self.random.randrange(SESSIONS)}" if self.random.random() < 0.7 else None
        before = self._history.get(session, self._system) if session is not None else self._system
        prompt = (*before, *self._tokens(self.random.randrange(1, 30)))
        if session is not None:
            self._history[session] = prompt if len(prompt) < 150 else self._system
        params = SamplingParams(max_tokens=self.random.randrange(1, 8), temperature=self.random.choice((0.0, 0.8)))
        request = Request(str(number), prompt, params, session)
        return replace(request, priority=self.random.choice((0, 0, 0, 1)))

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(3, self._vocab) for _ in range(count))


def resident_mb() -> float:
    """After handing back what only the allocator holds, so that a leak is told from a pool."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss) / 2**20


def _tiny() -> tuple[Engine, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from paceline.engine.attention import ATTENTION_NAME

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=199, num_key_value_heads=2, max_position_embeddings=512, **shape)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    runner = ModelRunner(model)
    kv = SlabKVCache(runner.kv_geometry(), TINY_KV_TOKENS, runner.max_model_len)
    return Engine(runner, kv, EngineLimits(runner.max_model_len, 16, 512, 64, 64)), runner.vocab_size


def _real(name: str) -> tuple[Engine, int]:
    loaded = load_model(resolve(name).path, EngineSettings(kv_tokens=REAL_KV_TOKENS))
    return loaded.engine(), loaded.runner.vocab_size


if __name__ == "__main__":
    sys.exit(main())
