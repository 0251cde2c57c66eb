"""`paceline bench engine`: one model, one process, no server.

Each figure is a median over interleaved rounds. The floor of a decode step on a CPU is its matrix products,
which read every weight once; the step is shown as a multiple of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from paceline.bench.measure import Figure, rounds, seconds
from paceline.bench.quality import Quality, measure
from paceline.bench.scorers import EngineScorer, TransformersScorer
from paceline.bench.text import encode, language_reference
from paceline.config import ComputeDtype, EngineSettings
from paceline.engine.attention import Window
from paceline.engine.engine import Engine
from paceline.engine.kv_cache import KVEntry
from paceline.engine.lean import LeanRunner
from paceline.engine.load import LoadedModel
from paceline.types import Request, SamplingParams

CONTEXT = 128
PROMPT = 1024
STREAMS = 16
WINDOW = 6
TEXT_TOKENS = 2048
TEXT_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `quick` is for a look, not for a report."""

    tokens: int = 64
    repeats: int = 7
    step_repeats: int = 15

    @classmethod
    def quick(cls) -> Sizes:
        return cls(tokens=24, repeats=3, step_repeats=5)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


class EngineBench:
    """Our engine over a loaded model. Prompts are random tokens, new ones each time: nothing comes from a cache."""

    def __init__(self, model: LoadedModel, sizes: Sizes) -> None:
        self.model = model
        self._sizes = sizes
        self._random = random.Random(0)
        self._entries: list[KVEntry] = []
        limits = replace(model.limits, max_num_seqs=STREAMS)
        self.engine: Engine = replace(model, limits=limits).engine()

    def step_figures(self) -> dict[str, Figure]:
        """Milliseconds of a step at context 128, by rows; and of its matrix products alone."""
        runner = self.model.runner
        subjects: dict[str, Callable[[], float]] = {}
        for rows in (1, WINDOW):
            window = Window(self._entry(CONTEXT + rows), self._prompt(rows), sample=rows)
            subjects[f"step of {rows}"] = _milliseconds(partial(runner.run, [window]))
            if isinstance(runner, LeanRunner):
                subjects[f"products of {rows}"] = _milliseconds(partial(runner.run_products, rows))
        try:
            return rounds(subjects, "ms", self._sizes.step_repeats)
        finally:
            for entry in self._entries:
                self.engine.kv.release(entry)
            self._forget()

    def decode(self, streams: int = 1, prompt: int = 32) -> float:
        """Tokens/s of all streams together, after their prompts."""
        params = greedy(self._sizes.tokens)
        for n in range(streams):
            self.engine.add(Request(f"bench-{n}", self._prompt(prompt), params))
        begun: set[str] = set()
        while len(begun) < streams:
            begun |= self.engine.step().keys()
        produced = 0

        def finish() -> None:
            nonlocal produced
            while self.engine.has_work:
                produced += sum(len(delta.token_ids) for delta in self.engine.step().values())

        took = seconds(finish)
        self._forget()
        return produced / took

    def prefill(self, tokens: int = PROMPT) -> float:
        """Prompt tokens/s of one prompt, with its first token drawn."""
        self.engine.add(Request("bench", self._prompt(tokens), greedy(1)))

        def finish() -> None:
            while self.engine.has_work:
                self.engine.step()

        took = seconds(finish)
        self._forget()
        return tokens / took

    def _forget(self) -> None:
        self.engine.kv.evict(self.engine.kv.usage().total)

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(100, self.model.runner.vocab_size - 100) for _ in range(tokens))

    def _entry(self, room: int) -> KVEntry:
        """A KV entry with CONTEXT tokens in it."""
        ids = self._prompt(room)
        entry = self.engine.kv.reserve(ids, room)
        assert entry is not None
        self.model.runner.run([Window(entry, ids[:CONTEXT], sample=0)])
        self.engine.kv.append(entry, ids[:CONTEXT])
        self._entries.append(entry)
        return entry


def quality(model: LoadedModel, reference: PreTrainedModel, tokens: int = TEXT_TOKENS) -> Quality:
    """What the chosen backends cost against Transformers' own float32 forward pass, on Python's language reference."""
    ids, prefix = encode(model.tokenizer, language_reference().content, tokens)
    context = min(TEXT_CONTEXT, tokens)
    return measure(
        TransformersScorer(reference), EngineScorer(model), ids, context=context, stride=context // 2, prefix=prefix
    )


def settings(threads: int | None, compute_dtype: ComputeDtype = "auto") -> EngineSettings:
    """The engine as a user gets it, with a KV cache that holds the benchmark's streams."""
    chosen = {} if threads is None else {"threads": threads}
    return EngineSettings(max_num_seqs=STREAMS, kv_tokens=16384, compute_dtype=compute_dtype, **chosen)


def _milliseconds(run: Callable[[], object]) -> Callable[[], float]:
    return lambda: seconds(run) * 1e3
