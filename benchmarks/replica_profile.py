"""Measures what a replica can do here, and prints it as a profile for `paceline autoscale simulate --profile`.

    python benchmarks/replica_profile.py smollm2-135m --sequences 1,2,4,8,16,32 > mine.yaml

Steps are those in which all sequences decode, at a context of 256 tokens; prompts are 1024 tokens, one after the other.
Both are medians; the least and most go to standard error. `start_s` has to be filled in: how long a replica takes from
being wanted to serving.
"""

from __future__ import annotations

import argparse
import random
import sys
from statistics import median

import torch
import yaml

from paceline.bench.measure import seconds
from paceline.config import EngineSettings
from paceline.engine.engine import Engine
from paceline.engine.load import LoadedModel, load_model
from paceline.models import resolve
from paceline.types import Request, SamplingParams

CONTEXT, PROMPT = 256, 1024
WARM_UP, STEPS = 4, 8


class Measured:
    """One engine and its requests, of random tokens: nothing comes from a cache."""

    def __init__(self, model: LoadedModel) -> None:
        self._engine: Engine = model.engine()
        self._most = model.runner.vocab_size - 100
        self._random = random.Random(0)
        self._count = 0

    def add(self, prompt: int, tokens: int) -> str:
        self._count += 1
        ids = tuple(self._random.randrange(100, self._most) for _ in range(prompt))
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self._engine.add(Request(f"profile-{self._count}", ids, params))
        return f"profile-{self._count}"

    def finish(self) -> None:
        while self._engine.has_work:
            self._engine.step()

    def steps(self, sequences: int) -> list[float]:
        """Seconds of steps in which so many decode."""
        names = {self.add(CONTEXT, WARM_UP + STEPS + sequences) for _ in range(sequences)}
        begun: set[str] = set()
        while begun < names:
            begun |= self._engine.step().keys()
        for _ in range(WARM_UP):
            self._engine.step()
        times = [seconds(self._engine.step) for _ in range(STEPS)]
        self.finish()
        self._engine.kv.evict(self._engine.kv.usage().total)
        return times

    def prompt(self) -> float:
        """Tokens a second."""
        self.add(PROMPT, 1)
        took = seconds(self.finish)
        self._engine.kv.evict(self._engine.kv.usage().total)
        return PROMPT / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sequences", default="1,2,4,8,16", help="for which steps are measured")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    counts = sorted({int(count) for count in asked.sequences.split(",")})
    model = load_model(resolve(asked.model).path, EngineSettings(max_num_seqs=max(counts)))
    measured = Measured(model)
    measured.prompt()
    rounds = [({n: measured.steps(n) for n in counts}, measured.prompt()) for _ in range(asked.rounds)]
    steps = {n: [time for taken, _ in rounds for time in taken[n]] for n in counts}
    prompts = [pace for _, pace in rounds]
    for n, times in steps.items():
        print(f"{n} sequences: {1e3 * min(times):.2f} to {1e3 * max(times):.2f} ms", file=sys.stderr)
    print(f"prompts: {min(prompts):.0f} to {max(prompts):.0f} tokens/s", file=sys.stderr)
    print(yaml.safe_dump(_profile(asked.model, model, steps, prompts), sort_keys=False), end="")


def _profile(name: str, model: LoadedModel, steps: dict[int, list[float]], prompts: list[float]) -> dict[str, object]:
    chunk = model.limits.max_prefill_while_decoding or model.limits.max_batched_tokens
    return {
        "name": name.rsplit("/", 1)[-1],
        "source": f"benchmarks/replica_profile.py: context {CONTEXT}, prompts of {PROMPT} tokens",
        "device": "gpu" if torch.cuda.is_available() else "cpu",
        "step_s": {n: round(median(times), 6) for n, times in steps.items()},
        "prefill_tokens_per_s": round(median(prompts)),
        "chunk_tokens": chunk,
        "max_num_seqs": max(steps),
        "max_queued_requests": model.limits.max_queued_requests,
        "kv_tokens": model.kv_tokens,
        "start_s": 60,
    }


if __name__ == "__main__":
    main()
