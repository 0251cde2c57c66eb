"""`paceline bench speculation`: what each source brings, and how close the adaptive depth comes to the best fixed one.

    grounded   answers that repeat a text in the prompt: prompt lookup against plain decoding
    chat       answers that do not: prompt lookup must then cost nothing, and a trained draft has its place
    synthetic  candidates accepted with a set probability, from a draft of random weights that takes a tenth of the
               target's step: fixed depths and the adaptive one at several batch sizes

What is compared runs in turn, on one model, in one process. The draft runs in the target's own thread.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paceline.bench.engine import STREAMS, settings
from paceline.bench.measure import Figure, rounds
from paceline.config import SpeculationSettings
from paceline.engine.engine import Engine
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.verify_cost import measure_verify_cost
from paceline.speculation.cost import VerifyCost
from paceline.speculation.local import LocalProposer
from paceline.types import Request, SamplingParams

BATCHES = (1, 4, 16)
DEPTHS = (0, 1, 2, 3, 4, 5, 6, 8)
ACCEPTANCE = 0.8
DRAFT_SHARE = 0.1
"""Of the target's step, for a step of the synthetic draft."""
DRAFT_WIDTH = 64
MOST_LAYERS = 64
PROMPT = 64
PLAIN = SpeculationSettings(enabled=False)
LOOKUP = SpeculationSettings()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; `quick` is for a look, not for a report."""

    answer: int = 96
    tokens: int = 96
    repeats: int = 5
    batches: tuple[int, ...] = BATCHES
    depths: tuple[int, ...] = DEPTHS
    tasks: int | None = None

    @classmethod
    def quick(cls) -> Sizes:
        return cls(answer=48, tokens=32, repeats=1, batches=(1, 4), depths=(0, 2, 5), tasks=3)


def grounded_prompts() -> list[str]:
    """Every instruction over every text."""
    data = _data()["grounded"]
    return [f"{ask}\n\n{text}" for text in data["texts"] for ask in data["instructions"]]


def chat_prompts() -> list[str]:
    found: list[str] = _data()["chat"]
    return found


class SpeculationBench:
    """Engines over one loaded model. The curve of costs is measured once, as it is at start-up."""

    def __init__(self, model: LoadedModel, sizes: Sizes, cost: VerifyCost | None = None) -> None:
        self.model = replace(model, limits=replace(model.limits, max_num_seqs=STREAMS))
        self.cost = cost or measure_verify_cost(model.runner)
        self._sizes = sizes

    def answers(
        self, name: str, prompts: Sequence[str], draft: LoadedModel | None = None, temperature: float = 0.0
    ) -> dict[str, Figure]:
        """Tokens a second over all answers, one stream: plain, and at the adaptive depth with prompt lookup, and with
        the draft as well."""
        ids = [self._chat_ids(prompt) for prompt in prompts][: self._sizes.tasks]
        params = SamplingParams(temperature=temperature, max_tokens=self._sizes.answer, seed=0 if temperature else None)
        subjects: dict[str, Callable[[], float]] = {}
        ways: list[tuple[str, SpeculationSettings, LoadedModel | None]] = [
            ("plain", PLAIN, None),
            ("prompt lookup", LOOKUP, None),
        ]
        if draft is not None:
            ways.append(("draft and lookup", LOOKUP, draft))
        for how, speculation, drafting in ways:
            proposer = None if drafting is None else LocalProposer(drafting.drafter())
            engine = self.model.engine(proposer, speculation, self._fresh_cost())
            subjects[f"{name}, {how}"] = partial(_one_by_one, engine, ids, params)
        return rounds(subjects, "tokens/s", self._sizes.repeats)

    def synthetic(self, batch: int, draft: LoadedModel) -> dict[str, Figure]:
        """Tokens a second of that many streams at each fixed depth and at the adaptive one."""
        subjects: dict[str, Callable[[], float]] = {}
        choices: list[int | Literal["auto"]] = [*self._sizes.depths, "auto"]
        for depth in choices:
            engine = self._synthetic_engine(depth, draft)
            what = "auto" if depth == "auto" else f"depth {depth}"
            subjects[f"synthetic {ACCEPTANCE:g}, batch {batch}, {what}"] = partial(self._streams, engine, batch)
        return rounds(subjects, "tokens/s", self._sizes.repeats)

    def _synthetic_engine(self, depth: int | Literal["auto"], draft: LoadedModel) -> Engine:
        if depth == 0:
            return self.model.engine(None, PLAIN)
        speculation = SpeculationSettings(
            depth=depth,
            prompt_lookup_num_tokens=0,
            synthetic_acceptance=ACCEPTANCE,
        )
        return self.model.engine(LocalProposer(draft.drafter()), speculation, self._fresh_cost())

    def _streams(self, engine: Engine, batch: int) -> float:
        """Of all streams together, from when each has its first token until so many tokens are produced. They all run
        until then: streams that end one after the other would leave the last ones a smaller batch. Prompts and seeds
        are the same every time."""
        draw, enough = random.Random(batch), batch * self._sizes.tokens
        room = min(enough + PROMPT, self.model.limits.max_model_len - PROMPT)
        for n in range(batch):
            params = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True, seed=n)
            ids = tuple(draw.randrange(100, self.model.runner.vocab_size - 100) for _ in range(PROMPT))
            engine.add(Request(f"bench-{n}", ids, params))
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= engine.step().keys()
        produced, began = 0, time.perf_counter()
        while produced < enough and engine.has_work:
            produced += sum(len(delta.token_ids) for delta in engine.step().values())
        rate = produced / (time.perf_counter() - began)
        for n in range(batch):
            engine.abort(f"bench-{n}")
        engine.kv.evict(engine.kv.usage().total)
        return rate

    def _chat_ids(self, prompt: str) -> tuple[int, ...]:
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            return tuple(tokenizer.encode(prompt))
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def _fresh_cost(self) -> VerifyCost:
        """The same curve, without what another engine learnt."""
        return self.cost.fresh()


def synthetic_draft(model: LoadedModel, target_step_s: float, folder: Path, threads: int | None) -> LoadedModel:
    """A small Llama of random weights with the target's tokenizer, of as many layers as make its step DRAFT_SHARE of
    the target's, as nearly as that can be. `folder` takes its files."""
    few, many = 1, 9
    steps = [_step_seconds(_random_llama(model, layers, folder, threads)) for layers in (few, many)]
    layer_s = max((steps[1] - steps[0]) / (many - few), 1e-6)
    layers = few + round((DRAFT_SHARE * target_step_s - steps[0]) / layer_s)
    return _random_llama(model, min(max(1, layers), MOST_LAYERS), folder, threads)


def _random_llama(model: LoadedModel, layers: int, folder: Path, threads: int | None) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=model.runner.vocab_size,
        hidden_size=DRAFT_WIDTH,
        intermediate_size=3 * DRAFT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=min(2048, model.runner.max_model_len),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    path = folder / f"random-{layers}"
    LlamaForCausalLM(config).half().save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return load_model(path, settings(threads))


def _step_seconds(model: LoadedModel) -> float:
    return measure_verify_cost(model.runner, budget_s=0.3).curve(1)


def _one_by_one(engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> float:
    """Tokens a second after the first token of each answer."""
    produced, took = 0, 0.0
    for ids in prompts:
        engine.add(Request("bench", ids, params))
        while not engine.step():
            pass
        began = time.perf_counter()
        while engine.has_work:
            produced += sum(len(delta.token_ids) for delta in engine.step().values())
        took += time.perf_counter() - began
        engine.kv.evict(engine.kv.usage().total)
    return produced / took


def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("paceline.bench") / "data" / "tasks.json").read_text())
    return found
