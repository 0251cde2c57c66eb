"""Which attention kernels for a GPU run here, and what the others lack. Imports none of them."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

NEEDS = {
    "triton": "Triton is not installed; it comes with PyTorch for CUDA",
    "flash_attention_2": None,
    "flash_attention_3": "FlashAttention-3 is not installed; pip install fa3-fwd",
    "varlen_attn": "this PyTorch has no varlen_attn that reads blocks; PyTorch 2.13 has",
}
"""By the names in `engine.attn_implementation`: what to do where a kernel does not run."""


def missing(name: str) -> str | None:
    """Why an attention kernel does not run with what is installed, or None."""
    found = {"triton": _has_triton, "flash_attention_3": _has_flash_3, "varlen_attn": _has_varlen}.get(name)
    return None if found is None or found() else NEEDS[name]


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _has_flash_3() -> bool:
    return any(find_spec(name) is not None for name in ("flash_attn_interface", "fa3_fwd_interface"))


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen_attn).parameters
