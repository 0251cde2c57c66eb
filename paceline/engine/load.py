"""From a model's files to something that runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.config import EngineSettings, SpeculationSettings
from paceline.engine.backends import KV_SHARE_OF_FREE_MEMORY, Backends, Choice, free_memory, resolve_backends
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.families import refuse_unservable, runner_for
from paceline.engine.heap import compact_allocations
from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.lean import NotLeanError, lean_runner
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.reduced_vocab import ReducedVocabRunner
from paceline.engine.runner import ModelRunner, Runner
from paceline.errors import ConfigError
from paceline.models import (
    draft_folder,
    eos_token_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
    tokenizer_fingerprint,
)
from paceline.models.linear import exact_in_fp16, use_fp16_linears
from paceline.speculation.proposer import Proposer

logger = logging.getLogger(__name__)

CPU_PREFILL_WHILE_DECODING = 64
"""Prompt tokens beside running streams on a CPU. Of smollm2-135m on one core a plain decode step takes 15 ms, with 64
prompt tokens 167 ms, with 512 1.4 s; prefill alone goes at 383 tokens a second in chunks of 64, at 395 at best."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and what was chosen for it. A draft has no tokenizer of its own."""

    runner: Runner
    tokenizer: Any
    eos: frozenset[int]
    limits: EngineLimits
    kv_tokens: int
    fingerprint: str
    choices: tuple[Choice, ...]

    def engine(self, proposer: Proposer | None = None, speculation: SpeculationSettings | None = None) -> Engine:
        """An engine with a KV cache of its own."""
        return Engine(
            self.runner,
            self._kv_cache(),
            self.limits,
            eos=self.eos,
            decoder=self.tokenizer,
            proposer=proposer,
            speculation=speculation,
        )

    def drafter(self) -> Drafter:
        """A drafter with a KV cache of its own."""
        limits = self.limits
        return Drafter(
            self.runner,
            self._kv_cache(),
            max_batched_tokens=limits.max_batched_tokens,
            max_model_len=limits.max_model_len,
        )

    def _kv_cache(self) -> SlabKVCache:
        return SlabKVCache(self.runner.kv_geometry(), self.kv_tokens, self.limits.max_model_len)


def load_model(path: Path, settings: EngineSettings) -> LoadedModel:
    """Load weights and tokenizer from a folder. Raises ModelError or ConfigError with the remedy."""
    backends = resolve_backends(settings)
    torch.set_num_threads(backends.threads)
    refuse_unservable(load_config(path))
    with compact_allocations():
        runner, choices = _load_runner(path, backends)
    if draft_folder.is_draft(path):
        runner = ReducedVocabRunner(runner, *draft_folder.load_tokens(path))
    limits = _limits(settings, runner)
    kv_tokens = _kv_tokens(settings, runner.kv_geometry(), limits)
    logger.info("%s: %s; %d KV tokens", path.name, ", ".join(f"{c.name} {c.value}" for c in choices), kv_tokens)
    if draft_folder.is_draft(path):
        fingerprint = draft_folder.read_card(path).fingerprint
        return LoadedModel(runner, None, frozenset(), limits, kv_tokens, fingerprint, choices)
    tokenizer = load_tokenizer(path)
    eos = eos_token_ids(path, tokenizer=tokenizer)
    return LoadedModel(runner, tokenizer, eos, limits, kv_tokens, tokenizer_fingerprint(tokenizer), choices)


def _load_runner(path: Path, backends: Backends) -> tuple[Runner, tuple[Choice, ...]]:
    """The lean pass if the model has one, else the model's own code; and the choices as they turned out."""
    whole = _whole(path, backends)
    fp16 = backends.fp16_linears if backends.fp16_linears is not None else exact_in_fp16(whole.model)
    replaced = [] if fp16 else [Choice("linear layers", "torch", "the weights are not exact in fp16, or as configured")]
    runner: Runner | None = None
    try:
        if isinstance(whole, PerSequenceRunner):
            replaced.append(Choice("attention", "the model's own, sequence by sequence", whole.why))
            raise NotLeanError("its attention cannot be replaced")
        if backends.kernels is not None:
            runner = lean_runner(whole, backends.kernels, fp16=fp16, consume=True)
    except NotLeanError as error:
        replaced.append(Choice("forward pass", "transformers", str(error)))
        if error.spent:
            whole = _whole(path, backends)
    if runner is None:
        runner = whole
        if fp16:
            use_fp16_linears(whole.model)
    by_name = {choice.name: choice for choice in (*backends.choices, *replaced)}
    return runner, tuple(by_name.values())


def _whole(path: Path, backends: Backends) -> ModelRunner | PerSequenceRunner:
    return runner_for(load_causal_lm(path, dtype=backends.dtype or "auto", device=backends.device))


def _limits(settings: EngineSettings, runner: Runner) -> EngineLimits:
    own = runner.max_model_len
    if settings.max_model_len != "auto" and settings.max_model_len > own:
        raise ConfigError(
            f"engine.max_model_len: {settings.max_model_len} is beyond the model's own {own}",
            param="engine.max_model_len",
        )
    return EngineLimits(
        max_model_len=own if settings.max_model_len == "auto" else settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_queued_requests=settings.max_queued_requests,
        max_prefill_while_decoding=_prefill_while_decoding(settings, runner.device),
    )


def _prefill_while_decoding(settings: EngineSettings, device: torch.device) -> int | None:
    if settings.max_prefill_tokens_while_decoding != "auto":
        return settings.max_prefill_tokens_while_decoding
    return CPU_PREFILL_WHILE_DECODING if device.type == "cpu" else None


def _kv_tokens(settings: EngineSettings, geometry: KVGeometry, limits: EngineLimits) -> int:
    if settings.kv_tokens != "auto":
        return settings.kv_tokens
    room = int(free_memory(geometry.device) * KV_SHARE_OF_FREE_MEMORY) // geometry.bytes_per_token
    return min(room, limits.max_num_seqs * limits.max_model_len)
