"""Which attention kernels for a GPU run here, and what the others lack. Imports none of them."""

from __future__ import annotations

import importlib
import inspect
from importlib.util import find_spec

NEEDS = {
    "triton": "Triton is not installed; it comes with PyTorch for CUDA",
    "flash_attention_2": None,
    "flash_attention_3": "no FlashAttention-3 that reads blocks is installed; build it from its sources with paged KV "
    "(the wheel fa3-fwd is built without)",
    "varlen_attn": "this PyTorch has no varlen_attn that reads blocks; PyTorch 2.13 has",
}
"""By the names in `engine.attn_implementation`: what to do where a kernel does not run."""

FLASH_3 = (("flash_attn_interface", "flash_attn_config"), ("fa3_fwd_interface", "fa3_fwd_config"))
"""Modules of FlashAttention-3, as it is named upstream and in a wheel, and where each says how it was built."""


def missing(name: str) -> str | None:
    """Why an attention kernel does not run with what is installed, or None."""
    found = {"triton": _has_triton, "flash_attention_3": _has_flash_3, "varlen_attn": _has_varlen}.get(name)
    return None if found is None or found() else NEEDS[name]


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _has_flash_3() -> bool:
    return any(find_spec(module) is not None and _reads_blocks(config) for module, config in FLASH_3)


def _reads_blocks(config: str) -> bool:
    """What FlashAttention-3's own record of its build says."""
    try:
        flags = importlib.import_module(config).CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return True
    return not flags.get("FLASHATTENTION_DISABLE_PAGEDKV", False)


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters
