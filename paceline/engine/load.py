"""From a model's files to something that runs."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from paceline.config import EngineSettings, SessionSettings, SpeculationSettings
from paceline.engine.backends import (
    BLOCK_READERS,
    KV_SHARE_OF_FREE_MEMORY,
    Backends,
    Choice,
    device_for,
    free_memory,
    resolve_backends,
)
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine, EngineLimits
from paceline.engine.families import refuse_unservable, runner_for
from paceline.engine.heap import compact_allocations
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers
from paceline.engine.lean import NotLeanError, lean_runner, refuse_other_structures
from paceline.engine.native import Kernels
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.products import Packer, replace_linears
from paceline.engine.reduced_vocab import ReducedVocabRunner
from paceline.engine.rehearsal import rehearse
from paceline.engine.restores import Restores
from paceline.engine.runner import Runner
from paceline.engine.tp.group import Gathering, Group, Meeting
from paceline.engine.tp.groups import open_group
from paceline.engine.tp.layers import Seams, join_ranks
from paceline.engine.tp.leader import Leader, meet
from paceline.engine.tp.local import local_ranks
from paceline.engine.tp.place import hosts, settled
from paceline.engine.tp.plan import Ready
from paceline.engine.tp.runner import ShardedRunner
from paceline.engine.tp.share import Share
from paceline.engine.verify_cost import measure_verify_cost
from paceline.errors import ConfigError, EngineError, InvalidRequest
from paceline.models import (
    draft_folder,
    eos_token_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from paceline.models.lazy import empty_causal_lm, with_weights_in_files
from paceline.models.linear_roles import uncut
from paceline.models.load import refuse_rounding_twice
from paceline.models.prequantized import quantization_method, unpacked_weights
from paceline.models.quantization import LibraryQuantization, round_linears, runs_in_library
from paceline.models.sharding import ShardPlan
from paceline.models.shares import load_share
from paceline.models.spread import Spread, is_spread
from paceline.sessions.rules import WindowRules
from paceline.speculation.cost import VerifyCost
from paceline.speculation.grammar import Grammars, tokenizer_text
from paceline.speculation.proposer import Proposer
from paceline.speculation.speculator import speculator_for
from paceline.types import SamplingParams

logger = logging.getLogger(__name__)

GIB = 2**30
WEIGHTS_SHARE_OF_FREE_MEMORY = 0.7
"""What `device_map: auto` may fill; the KV cache takes its share of the rest."""
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
    kv_geometry: KVGeometry
    kv_tokens: int
    key_shift: KeyShift | str
    fingerprint: str
    kv_identity: str
    """The same where keys and values of a text are the same: of weights, how they are multiplied and what is stored."""
    choices: tuple[Choice, ...]
    grammars: Grammars | None = None
    """None if the tokenizer is not at hand, or not one that grammars need."""

    def engine(
        self,
        draft: Proposer | None = None,
        speculation: SpeculationSettings | None = None,
        cost: VerifyCost | None = None,
        sessions: SessionSettings | None = None,
        max_queued_prefill_s: float | None = None,
    ) -> Engine:
        """An engine with a KV cache of its own, and the tiers below it that `sessions` names; without `speculation` it
        decodes plainly.

        `cost` is measured, in about a second, if it is needed and not given. `max_queued_prefill_s` bounds the queue
        where `max_queued_prefill_tokens` is auto; where all requests are there at once, as offline, it has no bound.
        Raises ConfigError if the disk tier's folder cannot be used.
        """
        speculation = speculation or SpeculationSettings(enabled=False)
        sessions = sessions or SessionSettings()
        tiers = self._tiers(sessions)
        kv = self._kv_cache(tiers)
        self._warm_up(kv)
        return Engine(
            self.runner,
            kv,
            replace(self.limits, max_queued_prefill_s=max_queued_prefill_s),
            eos=self.eos,
            decoder=self.tokenizer,
            speculator=speculator_for(speculation, draft, lambda: cost or measure_verify_cost(self.runner, kv)),
            speculation=speculation,
            restores=Restores(kv, tiers, sessions.kv_restore_timeout_s) if tiers is not None else None,
            grammars=self.grammars,
        )

    def close(self) -> None:
        """Let the other ranks of a sharded model end. Idempotent."""
        self.runner.close()

    def drafter(self, grammars: Grammars | None = None) -> Drafter:
        """A drafter with a KV cache of its own; with its target's `grammars` if that is in the same process."""
        limits = self.limits
        kv = self._kv_cache()
        self._warm_up(kv)
        drafter = Drafter(
            self.runner,
            kv,
            max_batched_tokens=limits.max_batched_tokens,
            max_model_len=limits.max_model_len,
            max_prefill_while_drafting=limits.max_prefill_while_decoding,
            grammars=grammars or self.grammars,
        )
        if self.runner.device.type != "cpu":
            rehearse(drafter)
        return drafter

    def _kv_cache(self, tiers: KVTiers | None = None) -> SlabKVCache:
        spill = tiers.put if tiers is not None else None
        longest = min(self.limits.max_model_len, self.kv_tokens)
        memory = self.runner.kv_memory(self.kv_geometry, self.kv_tokens, longest)
        return SlabKVCache(self.kv_geometry, self.kv_tokens, longest, self.key_shift, spill, memory)

    def _warm_up(self, kv: SlabKVCache) -> None:
        began = time.perf_counter()
        if shapes := self.runner.warm_up(kv.memory):
            logger.info("captured %d graphs in %.1f s", shapes, time.perf_counter() - began)

    def _tiers(self, sessions: SessionSettings) -> KVTiers | None:
        """None if there is neither memory nor a folder for them."""
        host_bytes, files = int(sessions.kv_host_gib * GIB), None
        if sessions.kv_disk_path is not None:
            # What was rounded is of no use to a server that promises not to round.
            identity = f"{self.kv_identity} {sessions.kv_tier_dtype}"
            folder = Path(sessions.kv_disk_path).expanduser()
            files = KVFiles(folder, identity, int(sessions.kv_disk_gib * GIB), sessions.ttl_s)
        if files is None and not host_bytes:
            return None
        slabs = Slabs(self.kv_geometry, min(self.limits.max_model_len, self.kv_tokens))
        return KVTiers(slabs, host_bytes, files, quantized=sessions.kv_tier_dtype == "int8", ttl_s=sessions.ttl_s)


def load_model(path: Path, settings: EngineSettings, leader: Leader | None = None) -> LoadedModel:
    """Load weights and tokenizer from a folder. Raises ModelError or ConfigError with the remedy.

    Of a model on several ranks this is rank 0; `leader` knows where the others are, None starts them on this host.
    """
    distilled = draft_folder.is_draft(path)
    tokenizer = None if distilled else load_tokenizer(path)
    if settings.tensor_parallel_size == 1:
        share = _load_share(path, settings)
        runner, kv_tokens = share.runner, share.kv_tokens
    else:
        share, runner, kv_tokens = _lead(path, settings, leader or local_ranks(path, settings))
    if distilled:
        runner = ReducedVocabRunner(runner, *draft_folder.load_tokens(path))
    limits = _limits(settings, runner)
    kv_geometry = _kv_geometry(settings, runner)
    key_shift = runner.key_shift()
    _check_window(limits, key_shift)
    chosen = ", ".join(f"{c.name} {c.value}" for c in share.choices)
    logger.info("%s: %s; %d KV tokens", path.name, chosen, kv_tokens)
    if distilled:
        fingerprint, eos = draft_folder.read_card(path).fingerprint, frozenset[int]()
        text = draft_folder.load_tokenizer_text(path)
    else:
        fingerprint, eos = tokenizer_fingerprint(tokenizer), eos_token_ids(path, tokenizer=tokenizer)
        text = tokenizer_text(tokenizer)
    grammars = Grammars(text, eos) if text is not None else None
    kv_identity = f"{weights_fingerprint(path)} {_rounding(settings, share.backends)} {kv_geometry}"
    return LoadedModel(
        runner,
        tokenizer,
        eos,
        limits,
        kv_geometry,
        kv_tokens,
        key_shift,
        fingerprint,
        kv_identity,
        share.choices,
        grammars,
    )


def load_follower(path: Path, settings: EngineSettings, meeting: Meeting, rank: int) -> tuple[Share, Ready]:
    """Another rank's share, and what rank 0 is to know of it."""
    store = TCPStore(meeting.host, meeting.store_port, is_master=False)
    loaded, _ = _load_rank(path, settings, store, rank, lambda: meet(store, meeting.size))
    return Share(loaded.runner), Ready(loaded.kv_tokens, loaded.forward_pass, os.getpid(), loaded.device_bytes)


def _lead(path: Path, settings: EngineSettings, leader: Leader) -> tuple[_LoadedShare, Runner, int]:
    """Rank 0's share, the runner of all ranks, and the tokens that each has room for. Raises EngineError."""
    try:
        plan = ShardPlan.of(load_config(path), settings.tensor_parallel_size)
        leader.join()
        loaded, leader.group = _load_rank(path, settings, leader.store, 0, leader.meet)
        share = Share(loaded.runner)
        others = leader.ready()
    except BaseException:
        leader.close()
        raise
    passes = {loaded.forward_pass, *(other.forward_pass for other in others)}
    if len(passes) > 1:
        leader.close()
        raise EngineError(f"the ranks would not run alike: {', '.join(sorted(passes))}")
    heads = [plan.kv_heads(rank) for rank in range(plan.size)]
    tokens = min(loaded.kv_tokens, *(other.kv_tokens for other in others))
    share_bytes = [loaded.device_bytes, *(other.device_bytes for other in others)]
    return loaded, ShardedRunner(leader, share, heads, share_bytes), tokens


def _load_rank(
    path: Path, settings: EngineSettings, store: TCPStore, rank: int, meet: Callable[[], None]
) -> tuple[_LoadedShare, Group]:
    """This process's share, in its place, and the group of all."""
    size = settings.tensor_parallel_size
    where = hosts(store, rank, size)
    settings = settled(settings, rank, where)
    group = open_group(
        store,
        rank,
        size,
        collectives=settings.collectives,
        device=device_for(settings),
        timeout_s=settings.collective_timeout_s,
        one_host=len(set(where)) == 1,
    )
    return _load_share(path, settings, Gathering(group, meet)), group


def _load_share(path: Path, settings: EngineSettings, group: Group | None = None) -> _LoadedShare:
    backends = resolve_backends(settings, distilled=draft_folder.is_draft(path))
    torch.set_num_threads(backends.threads)
    if backends.device.type == "cuda":
        # It plans anew for every length of a text: 40 ms to 1.4 s a token, the first time, on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
    refuse_unservable(load_config(path))
    before = _allocated(backends.device)
    with compact_allocations():
        runner, choices = _load_runner(path, backends, settings, group)
    tokens = _kv_tokens(settings, _kv_geometry(settings, runner), _limits(settings, runner))
    return _LoadedShare(runner, backends, choices, tokens, _allocated(backends.device) - before)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True)
class _LoadedShare:
    """What one process runs: the whole model, or a rank's share of it."""

    runner: Runner
    backends: Backends
    choices: tuple[Choice, ...]
    kv_tokens: int
    device_bytes: int
    """Allocated on its GPU by loading it; 0 on a CPU."""

    @property
    def forward_pass(self) -> str:
        return next((each.value for each in self.choices if each.name == "forward pass"), "")


def _rounding(settings: EngineSettings, backends: Backends) -> str:
    """Whatever of the settings changes what a product gives."""
    chosen = [str(backends.dtype), settings.linear_backend, settings.weight_dtype, settings.compute_dtype]
    if settings.tensor_parallel_size > 1:
        chosen.append(f"{settings.tensor_parallel_size} ranks")
    if settings.weight_dtype != "auto" or backends.quantization is not None:
        chosen.append(f"group {settings.group_size}")
    if backends.quantization is not None:
        chosen.append(backends.quantization.name)
    return " ".join(chosen)


def _load_runner(
    path: Path, backends: Backends, settings: EngineSettings, group: Group | None = None
) -> tuple[Runner, tuple[Choice, ...]]:
    """The lean pass if the model has one, else the model's own code; and the choices as they turned out.

    With a `group` it is this rank's share of the model, and all ranks load theirs at once.
    """
    share = None if group is None else _Share.of(path, backends, settings, group)
    runner: Runner
    if backends.kernels is None or backends.linears is None:
        runner, replaced = _general(path, backends, settings, share)
    else:
        try:
            runner, replaced = _lean(path, Packer(backends.linears), backends.kernels, share)
        except NotLeanError as error:
            runner, replaced = _general(path, backends, settings, share)
            replaced.append(Choice("forward pass", "transformers", str(error)))
    by_name = {choice.name: choice for choice in (*backends.choices, *replaced)}
    return runner, tuple(by_name.values())


@dataclass(frozen=True, slots=True)
class _Share:
    """What of a model this rank loads."""

    plan: ShardPlan
    group: Group

    @classmethod
    def of(cls, path: Path, backends: Backends, settings: EngineSettings, group: Group) -> _Share:
        """Raises ConfigError for what needs the whole model."""
        if backends.spread:
            raise ConfigError(
                "engine.device_map: auto spreads layers over devices, tensor_parallel_size parts each of them; set one",
                param="engine.device_map",
            )
        if backends.quantization is not None:
            refuse_rounding_twice(path)
        return cls(ShardPlan.of(load_config(path), group.size, group=settings.group_size), group)

    def load(
        self, path: Path, quantization: LibraryQuantization | None = None, **how: Any
    ) -> tuple[PreTrainedModel, Seams]:
        model = load_share(path, self.plan, self.group.rank, **how)
        if quantization is not None:
            round_linears(model, quantization)
        return model, join_ranks(model, self.plan, self.group)


def _lean(path: Path, packer: Packer, kernels: Kernels, share: _Share | None) -> tuple[Runner, list[Choice]]:
    """Never holds the model whole, unless its files need Transformers' own loading. Raises NotLeanError."""
    seams = None
    if share is not None:
        model, seams = share.load(path, dtype=torch.float32, device="cpu", in_files=True)
    else:
        model = _whole(path)
    return lean_runner(model, kernels, packer, packer.head, rounds=packer.rounds, seams=seams), [_linears(packer)]


def _whole(path: Path) -> PreTrainedModel:
    """A model for the lean pass, its weights in its files if that can be. Raises NotLeanError."""
    config = load_config(path)
    empty = empty_causal_lm(config, dtype=torch.float32)
    refuse_other_structures(empty)
    model = with_weights_in_files(empty, path)
    if isinstance(model, str):
        if unpacked_weights(path, config, "cpu") is None and (method := quantization_method(config)) is not None:
            raise NotLeanError(f"its checkpoint is {method}'s, whose library has modules of its own")
        logger.info("%s is loaded whole: %s", path.name, model)
        model = load_causal_lm(path, dtype=torch.float32, device="cpu", attn_implementation="eager")
    return model


def _general(
    path: Path, backends: Backends, settings: EngineSettings, share: _Share | None
) -> tuple[Runner, list[Choice]]:
    if share is not None:
        model, _ = share.load(path, backends.quantization, dtype=backends.dtype, device=backends.device)
    else:
        model = load_causal_lm(
            path,
            dtype=backends.dtype or "auto",
            device=backends.device,
            quantization=backends.quantization,
            spread=_spread(settings) if backends.spread else None,
        )
    whole = runner_for(model)
    if share is not None and isinstance(whole, PerSequenceRunner):
        raise uncut(model, f"it runs sequence by sequence ({whole.why})")
    replaced: list[Choice] = []
    if is_spread(model):
        replaced.append(Choice("device", _places(model), "each holds what the one before has no room for"))
    if runs_in_library(model):
        method = quantization_method(model.config) or "a library"
        replaced += [] if backends.quantization else [Choice("linear layers", method, "the checkpoint's own")]
    elif backends.linears is not None:
        packer = Packer(backends.linears)
        if replace_linears(whole.model, packer):
            replaced.append(_linears(packer))
    if isinstance(whole, PerSequenceRunner):
        own = Choice("attention", "the model's own, sequence by sequence", whole.why)
        return whole, [*replaced, own, Choice("kv layout", "static", "the model's own attention reads it")]
    if backends.attention in BLOCK_READERS and not is_spread(model):
        from paceline.engine.gpu.load import on_device

        runner, choices = on_device(whole, backends, settings, None if share is None else share.group)
        return runner, [*replaced, *choices]
    whole.attend_as(backends.attention, paged=backends.paged)
    return whole, replaced


def _spread(settings: EngineSettings) -> Spread:
    """Room for weights on every device, beside KV and activations."""
    room: dict[int | str, int] = {"cpu": int(free_memory(torch.device("cpu")) * WEIGHTS_SHARE_OF_FREE_MEMORY)}
    if settings.device != "cpu":
        for n in range(torch.cuda.device_count()):
            room[n] = int(free_memory(torch.device("cuda", n)) * WEIGHTS_SHARE_OF_FREE_MEMORY)
    return Spread(room, settings.offload_folder)


def _places(model: PreTrainedModel) -> str:
    """How many modules are on each device, for people."""
    places = Counter(str(place) for place in model.hf_device_map.values())
    return ", ".join(f"{'cuda:' if place.isdigit() else ''}{place} x{count}" for place, count in places.items())


def _linears(packer: Packer) -> Choice:
    logger.info("linear layers: %s: %s", packer.taken, packer.reason)
    return Choice("linear layers", packer.taken, packer.reason)


def _limits(settings: EngineSettings, runner: Runner) -> EngineLimits:
    own = runner.max_model_len
    if settings.max_model_len != "auto" and settings.max_model_len > own:
        raise ConfigError(
            f"engine.max_model_len: {settings.max_model_len} is beyond the model's own {own}",
            param="engine.max_model_len",
        )
    queued = settings.max_queued_prefill_tokens
    return EngineLimits(
        max_model_len=own if settings.max_model_len == "auto" else settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_queued_requests=settings.max_queued_requests,
        max_prefill_while_decoding=_prefill_while_decoding(settings, runner.device),
        ctx_size=settings.ctx_size,
        n_keep=settings.n_keep,
        n_discard=settings.n_discard,
        max_queued_prefill_tokens=None if queued == "auto" else queued,
    )


def _check_window(limits: EngineLimits, key_shift: KeyShift | str) -> None:
    """A window all requests would be refused for is refused here."""
    refusal = key_shift if isinstance(key_shift, str) else None
    rules = WindowRules(limits.max_model_len, limits.ctx_size, limits.n_keep, limits.n_discard, refusal)
    try:
        rules.resolve(SamplingParams())
    except InvalidRequest as error:
        raise ConfigError(f"engine.{error.message}", param=f"engine.{error.param}") from None


def _prefill_while_decoding(settings: EngineSettings, device: torch.device) -> int | None:
    if settings.max_prefill_tokens_while_decoding != "auto":
        return settings.max_prefill_tokens_while_decoding
    return CPU_PREFILL_WHILE_DECODING if device.type == "cpu" else None


def _kv_geometry(settings: EngineSettings, runner: Runner) -> KVGeometry:
    own = runner.kv_geometry()
    return own.quantized() if settings.kv_dtype == "int8" else own


def _kv_tokens(settings: EngineSettings, geometry: KVGeometry, limits: EngineLimits) -> int:
    if settings.kv_tokens != "auto":
        return settings.kv_tokens
    free = free_memory(geometry.device) * KV_SHARE_OF_FREE_MEMORY[geometry.device.type]
    if geometry.device.type == "cpu":
        free /= settings.tensor_parallel_size  # ranks share a host's memory
    room = int(free) // geometry.bytes_per_token
    return min(room, limits.max_num_seqs * limits.max_model_len)
