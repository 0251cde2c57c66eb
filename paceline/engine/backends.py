"""What this machine runs a model with, and why: decided once at load time, logged once, shown by `paceline doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from paceline.config import EngineSettings
from paceline.engine.gpu.kinds import missing
from paceline.engine.kv_blocks import BLOCK
from paceline.engine.native import Kernels, kernels
from paceline.engine.packed import GROUP, Activations
from paceline.engine.products import BACKENDS, Int4, Int8, KeepingBackend, LinearBackends, with_activations
from paceline.errors import ConfigError
from paceline.hardware import usable_cores
from paceline.models.quantization import LibraryQuantization, library_quantization
from paceline.speculation import coupling

KV_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.8}
"""A machine's memory is for others, too; a GPU's is there to be used."""
NEEDED = {
    "bnb_4bit_quant_type": ("quantization", "bitsandbytes_4bit"),
    "bnb_4bit_use_double_quant": ("quantization", "bitsandbytes_4bit"),
    "offload_folder": ("device_map", "auto"),
}
"""Settings that are for another one's value alone."""
BLOCK_READERS = ("triton", "flash_attention_3", "varlen_attn")
"""Attention kernels that read keys and values in blocks."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision, for people: what was decided, the value, the reason."""

    name: str
    value: str
    reason: str


OUR_ATTENTION = Choice("attention", "our kernel, ragged", "in blocks of keys; a row's result is the same in any window")
SDPA = Choice("attention", "sdpa, ragged", "PyTorch's scaled dot product, window by window over true lengths")


@dataclass(frozen=True, slots=True)
class Backends:
    """Every "auto" of EngineSettings resolved as far as the machine alone allows.

    `dtype` None keeps the checkpoint's. `linears` None leaves linear layers to the model, or to a library if
    `quantization` names one; which of several takes a layer only its weights can tell. `kernels` None means the
    model's own code runs, over several devices if `spread`.
    """

    device: torch.device
    dtype: torch.dtype | None
    threads: int
    linears: LinearBackends | None
    quantization: LibraryQuantization | None
    spread: bool
    kernels: Kernels | None
    choices: tuple[Choice, ...]
    attention: str = "sdpa"
    """By the name in `attn_implementation`; "auto" is resolved."""
    paged: bool = False
    fuses: bool = False
    """Whether layers are fused and short steps captured, where attention reads blocks."""
    weights_in_bytes: bool = False
    """On a GPU: fused layers' weights are rounded to 8 bits."""


def resolve_backends(settings: EngineSettings, *, distilled: bool = False) -> Backends:
    """Raises ConfigError where a setting asks for what this machine lacks. A `distilled` draft's activations may be
    coarse: it is trained to be guessed by, and verified."""
    device, why_device = _device(settings)
    dtype, why_dtype = _dtype(settings, device)
    threads, why_threads = _threads(settings)
    quantization = library_quantization(settings, device)
    others = _others_linears(settings, device, dtype, quantization)
    linears, linear_choice = _linears(settings, others, distilled)
    lean, why_lean = _forward(others)
    attention, why_attention = attention_for(settings, device)
    paged, why_cache = _cache(settings, device, attention)
    if device.type == "cpu" and attention != "auto":
        lean, why_lean = None, f"engine.attn_implementation is {attention}"
    choices = (
        Choice("device", str(device), why_device),
        Choice("dtype", "the checkpoint's" if dtype is None else str(dtype).removeprefix("torch."), why_dtype),
        Choice("threads", str(threads), why_threads),
        linear_choice,
        Choice("forward pass", "lean" if lean is not None else "transformers", why_lean),
        OUR_ATTENTION if lean is not None else Choice("attention", attention, why_attention),
        Choice("kv cache", *_kv(settings, dtype, device)),
        Choice("kv layout", "paged" if paged else "static", why_cache),
        Choice("compile", *_compiled(settings, attention)),
        Choice("draws", *_draws(device)),
    )
    spread = settings.device_map == "auto"
    fuses = settings.compile and attention in BLOCK_READERS
    in_bytes = device.type == "cuda" and settings.weight_dtype == "int8"
    if in_bytes and not fuses:
        raise ConfigError(
            "engine.weight_dtype: int8 on a GPU is for fused layers; set engine.compile: true and leave "
            "engine.attn_implementation: auto, or use engine.quantization",
            param="engine.weight_dtype",
        )
    return Backends(
        device, dtype, threads, linears, quantization, spread, lean, choices, attention, paged, fuses, in_bytes
    )


def device_for(settings: EngineSettings) -> torch.device:
    """Raises ConfigError if it is not there."""
    return _device(settings)[0]


def describe(settings: EngineSettings) -> list[Choice]:
    """The choices alone, for `paceline doctor`."""
    return list(resolve_backends(settings).choices)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _device(settings: EngineSettings) -> tuple[torch.device, str]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device: cuda is asked for, but torch sees no GPU here; set auto or cpu", param="engine.device"
        )
    if settings.device != "auto":
        return torch.device(settings.device), "as configured"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"{torch.cuda.get_device_name()} is visible"
    return torch.device("cpu"), "torch sees no GPU"


def _dtype(settings: EngineSettings, device: torch.device) -> tuple[torch.dtype | None, str]:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype), "as configured"
    if device.type == "cpu":
        return torch.float32, "activations and KV in full precision cost little on a CPU"
    return None, "what the weights were trained in"


def _threads(settings: EngineSettings) -> tuple[int, str]:
    if settings.threads != "auto":
        return settings.threads, "as configured"
    return usable_cores(), "cores this process may use (affinity and cgroup quota)"


def attention_for(settings: EngineSettings, device: torch.device) -> tuple[str, str]:
    """The attention kernel and why; on a CPU "auto" is left to the forward pass. Raises ConfigError."""
    named = settings.attn_implementation
    if named == "auto" and device.type != "cuda":
        return "auto" if device.type == "cpu" else "sdpa", SDPA.reason
    if named == "auto":
        why = missing("triton")
        if why is None and settings.kv_dtype == "auto":
            return "triton", "our kernel over blocks; prompts by FlashAttention"
        return "sdpa", f"our Triton kernel does not run here: {why or 'it reads no int8 keys'}"
    if named in ("sdpa", "eager"):
        return named, "as configured"
    if device.type != "cuda":
        raise ConfigError(
            f"engine.attn_implementation: {named} needs a GPU; on a CPU set auto, sdpa or eager",
            param="engine.attn_implementation",
        )
    if (why := missing(named)) is not None:
        raise ConfigError(
            f"engine.attn_implementation: {named} does not run here: {why}", param="engine.attn_implementation"
        )
    if settings.kv_dtype == "int8" and named in BLOCK_READERS:
        raise ConfigError(
            f"engine.kv_dtype: int8 is not for attention by {named}; set engine.attn_implementation: sdpa",
            param="engine.kv_dtype",
        )
    return named, "as configured"


def _cache(settings: EngineSettings, device: torch.device, attention: str) -> tuple[bool, str]:
    """Whether keys and values lie in one pool, and why."""
    named = settings.cache_implementation
    if attention in BLOCK_READERS:
        size = "max_model_len tokens" if named == "static" else f"{BLOCK} tokens"
        return named != "static", f"one pool, in blocks of {size}"
    if named == "paged" and device.type == "cpu":
        raise ConfigError(
            "engine.cache_implementation: paged needs a GPU; set auto, which commits a CPU's memory page by page",
            param="engine.cache_implementation",
        )
    return named == "paged", "as configured" if named != "auto" else "contiguous memory for each sequence"


def _compiled(settings: EngineSettings, attention: str) -> tuple[str, str]:
    if attention not in BLOCK_READERS:
        return "no", "for attention that reads blocks, on a GPU"
    if not settings.compile:
        return "no", "as configured"
    return "fused layers, CUDA graphs", "layers if the model is built like Llama, graphs of short steps"


def _others_linears(
    settings: EngineSettings,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: LibraryQuantization | None,
) -> tuple[str, str] | None:
    """What linear layers run with and why, if it is not ours. Raises ConfigError for settings that ours alone know."""
    if quantization is not None:
        found = quantization.name, "as configured"
    elif settings.device_map == "auto":
        found = "torch", "weights may be on several devices"
    elif device.type != "cpu":
        found = "torch", "cuBLAS on a GPU"
    elif dtype != torch.float32:
        found = "torch", "activations are not float32"
    else:
        return None
    fused = device.type == "cuda" and quantization is None and settings.device_map != "auto"
    if fused and settings.weight_dtype == "int8":
        found = "int8", "our kernels, over weights rounded to 8 bits for each output"
    asked = {
        "linear_backend": settings.linear_backend not in ("auto", "torch"),
        "weight_dtype": settings.weight_dtype not in (("auto", "int8") if fused else ("auto",)),
        "compute_dtype": settings.compute_dtype != "auto",
    }
    for name in (name for name, wanted in asked.items() if wanted):
        needed = "a CPU and float32 activations, without engine.quantization and engine.device_map"
        raise ConfigError(f"engine.{name}: {getattr(settings, name)} needs {needed}", param=f"engine.{name}")
    return found


def _linears(
    settings: EngineSettings, others: tuple[str, str] | None, distilled: bool
) -> tuple[LinearBackends | None, Choice]:
    _check_rounding(settings)
    if others is not None:
        return None, Choice("linear layers", *others)
    activations: Activations = settings.compute_dtype if settings.compute_dtype != "auto" else "int16"
    if settings.compute_dtype == "auto" and distilled:
        activations = "int8"
    backends = tuple(with_activations(each, activations, settings.group_size) for each in BACKENDS)
    missing = {backend.name: backend.missing() for backend in backends}
    keeping = tuple(each for each in backends if isinstance(each, KeepingBackend) and missing[each.name] is None)
    field = "linear_backend" if settings.weight_dtype == "auto" else "weight_dtype"
    named = getattr(settings, field)
    if named == "auto":
        reason = "of those that keep the checkpoint's weights the fastest, measured when it is loaded"
        reason += f"; activations of {activations}" if activations != "int16" else ""
        return LinearBackends(keeping), Choice("linear layers", " or ".join(one.name for one in keeping), reason)
    if (why := missing[named]) is not None:
        raise ConfigError(f"engine.{field}: {named} does not run here: {why}", param=f"engine.{field}")
    by_name = {backend.name: backend for backend in backends}
    if named != Int4.name:
        return LinearBackends(keeping, by_name[named]), Choice("linear layers", named, "as configured")
    # In 4 bits the head alone would cost more than all layers together, for a few per cent of the bytes.
    linears = LinearBackends(keeping, by_name[named], head=by_name[Int8.name])
    return linears, Choice("linear layers", named, "as configured; the output head in 8 bits")


def _check_rounding(settings: EngineSettings) -> None:
    """Raise ConfigError where two settings say how to round, or none does what another is for."""
    if settings.weight_dtype != "auto" and settings.linear_backend != "auto":
        raise ConfigError(
            f"engine.weight_dtype: {settings.weight_dtype} has products of its own; set engine.linear_backend: auto",
            param="engine.weight_dtype",
        )
    for name, needed in NEEDED.items():
        default = type(settings).model_fields[name].default
        if getattr(settings, name) != default and getattr(settings, needed[0]) != needed[1]:
            raise ConfigError(
                f"engine.{name}: says nothing without engine.{needed[0]}: {needed[1]}; set that, too",
                param=f"engine.{name}",
            )
    rounds = settings.weight_dtype != "auto" or settings.quantization == "torchao_int4"
    if settings.group_size != GROUP and not rounds:
        raise ConfigError(
            f"engine.group_size: {settings.group_size} is for weights that are rounded; set engine.weight_dtype",
            param="engine.group_size",
        )


def _forward(others: tuple[str, str] | None) -> tuple[Kernels | None, str]:
    if others is not None:
        return None, "our kernels are for float32 on a CPU, with linear layers of ours"
    found = kernels()
    if isinstance(found, str):
        return None, f"our kernels do not run here: {found}"
    return found, "fused projections and our own kernels; if the model is built like Llama"


def _draws(device: torch.device) -> tuple[str, str]:
    """Builds the kernel, if need be, so that no request waits for it."""
    if device.type != "cpu":
        return "on the device", "in the step's graph where our attention kernel runs; by torch where filters depend"
    found = coupling.kernel()
    if isinstance(found, str):
        return "torch", f"our kernel does not run here: {found}"
    return "our kernel", "the tokens are those torch would draw, in a twentieth of the time"


def _kv(settings: EngineSettings, dtype: torch.dtype | None, device: torch.device) -> tuple[str, str]:
    own = "the checkpoint's dtype" if dtype is None else str(dtype).removeprefix("torch.")
    stored = own if settings.kv_dtype == "auto" else settings.kv_dtype
    if settings.kv_tokens != "auto":
        return f"{settings.kv_tokens} tokens in {stored}", "as configured"
    return (
        f"{KV_SHARE_OF_FREE_MEMORY[device.type]:.0%} of free memory in {stored}",
        "shared by running and idle sessions",
    )
