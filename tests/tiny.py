"""Tiny random models with uneven shapes: real architectures, real weights files, milliseconds a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from paceline.config import SpeculationSettings
from paceline.engine.attention import ATTENTION_NAME
from paceline.engine.detokenizer import Decoder
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.kv_tiers import KVTiers
from paceline.engine.restores import Restores
from paceline.engine.runner import ModelRunner, Runner
from paceline.speculation.cost import VerifyCost
from paceline.speculation.proposer import Proposer
from paceline.speculation.speculator import speculator_for
from paceline.types import Delta, Request, SamplingParams

VOCAB = 199
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    **SPECIAL,
}
"""3 layers, 6 heads over 2 KV heads, weights large enough to have opinions; in Llama's words."""

# Products this small gain nothing from a second thread, and wait for it whenever the cores are busy.
torch.set_num_threads(1)


def tiny_llama(seed: int = 0, **overrides: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | overrides)).eval().requires_grad_(False)


def save_tokenizer(path: Path) -> None:
    """A tokenizer of the models' vocabulary, into their folder."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(path)


def ours(model: PreTrainedModel) -> ModelRunner:
    """The same weights behind our attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation(ATTENTION_NAME)
    return ModelRunner(twin)


def kv_for(
    runner: Runner, capacity: int = 4096, *, quantized: bool = False, tiers: KVTiers | None = None
) -> SlabKVCache:
    spill = tiers.put if tiers is not None else None
    geometry = geometry_of(runner, quantized=quantized)
    memory = runner.kv_memory(geometry, capacity, runner.max_model_len)
    return SlabKVCache(geometry, capacity, runner.max_model_len, runner.key_shift(), spill, memory)


def geometry_of(runner: Runner, *, quantized: bool = False) -> KVGeometry:
    own = runner.kv_geometry()
    return own.quantized() if quantized else own


def flat_cost() -> VerifyCost:
    """What a tiny model's pass costs, in the controller's eyes: rows next to nothing."""
    return VerifyCost({1: 2e-3, 64: 3e-3})


def engine_for(
    model: PreTrainedModel,
    *,
    capacity: int = 4096,
    max_num_seqs: int = 8,
    max_batched_tokens: int = 64,
    max_queued_requests: int = 64,
    max_prefill_while_decoding: int | None = None,
    depth: int | Literal["auto"] = 4,
    proposer: Proposer | None = None,
    lookup: int = 0,
    eos: frozenset[int] = frozenset(),
    runner: Runner | None = None,
    quantized: bool = False,
    decoder: Decoder | None = None,
    tiers: KVTiers | None = None,
    restore_timeout_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    max_queued_prefill_tokens: int | None = None,
    engine_clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> Engine:
    """`lookup` is `prompt_lookup_num_tokens`, `settings` are others of SpeculationSettings."""
    runner = runner or ours(model)
    limits = EngineLimits(
        runner.max_model_len,
        max_num_seqs,
        max_batched_tokens,
        max_queued_requests,
        max_prefill_while_decoding,
        max_queued_prefill_tokens=max_queued_prefill_tokens,
    )
    speculation = SpeculationSettings(depth=depth, prompt_lookup_num_tokens=lookup, **settings)
    speculator = speculator_for(speculation, proposer, flat_cost)
    kv = kv_for(runner, capacity, quantized=quantized, tiers=tiers)
    restores = Restores(kv, tiers, restore_timeout_s, measured=False, clock=clock) if tiers is not None else None
    return Engine(
        runner,
        kv,
        limits,
        eos=eos,
        decoder=decoder,
        speculator=speculator,
        speculation=speculation,
        restores=restores,
        clock=engine_clock,
    )


def drafter_for(model: PreTrainedModel, capacity: int = 4096) -> Drafter:
    runner = ours(model)
    return Drafter(runner, kv_for(runner, capacity), max_batched_tokens=64, max_model_len=runner.max_model_len)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def request(tokens: tuple[int, ...], name: str = "r", session: str | None = None, **params: object) -> Request:
    return Request(name, tokens, SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **params}), session)  # type: ignore[arg-type]


def run(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    """Add the requests and step until all are done; output tokens by request."""
    for each in requests:
        engine.add(each)
    return finish(engine)


def finish(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for name, delta in deltas(engine):
        tokens.setdefault(name, []).extend(delta.token_ids)
    engine.kv.check()
    return tokens


def deltas(engine: Engine) -> list[tuple[str, Delta]]:
    found = []
    while engine.has_work:
        found += engine.step().items()
    return found


def generate(model: PreTrainedModel, tokens: tuple[int, ...], max_tokens: int = 24) -> list[int]:
    """What transformers.generate answers, greedily, never ending early."""
    ids = torch.tensor([tokens], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()
