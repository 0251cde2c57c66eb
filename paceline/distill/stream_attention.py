"""One token of every stream over its own part of the cache, as a Triton kernel: each key and value is read once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

BLOCK = 64
ROWS = 16
"""Query heads of one group, padded to what a matrix unit takes."""
TOLERANCE = 0.02


def checked(device: torch.device, head_dim: int) -> Callable[..., torch.Tensor] | None:
    """The kernel, if Triton is there, compiles it, and it agrees with plain PyTorch on random numbers."""
    try:
        attend = build()
        options = {"device": device, "dtype": torch.float16}
        query = torch.randn(5, 2, 3, head_dim, **options)  # type: ignore[call-overload]
        keys, values = (torch.randn(5, 2, 3 * BLOCK, head_dim, **options) for _ in range(2))  # type: ignore[call-overload]
        start = torch.tensor([0, 7, 64, 100, 101], device=device)
        at = torch.tensor([100], device=device)
        index = torch.arange(3 * BLOCK, device=device)
        seen = (index >= start[:, None]) & (index <= at) | (index == at)
        scores = (query @ keys.transpose(-1, -2)).float() * 0.125
        expected = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1) @ values.float()
        difference = float((attend(query, keys, values, start, at, 0.125).float() - expected).abs().max())
    except Exception as error:
        logger.info("stream attention without Triton: %s", " ".join(str(error).split())[:200])
        return None
    if not difference < TOLERANCE:
        logger.warning("stream attention without Triton: its result differs by %.1e", difference)
        return None
    return attend


def build() -> Callable[..., torch.Tensor]:
    """attend(query [B, kv_heads, group, D], keys and values [B, kv_heads, T, D], start [B], at [1], scale)."""
    from paceline.distill.stream_kernel import attend_streams

    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: torch.Tensor,
        at: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        streams, kv_heads, group, dim = query.shape
        if group > ROWS or dim not in (32, 64, 128):
            raise ValueError(f"no kernel for {group} heads a group of {dim}")
        query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
        attend_streams[(streams * kv_heads,)](
            query, keys, values, out, start, at, scale, keys.stride(0), keys.stride(1), keys.stride(2),
            KV_HEADS=kv_heads, GROUP=group, DIM=dim, ROWS=ROWS, BLOCK=BLOCK, num_warps=2, num_stages=3,
        )  # fmt: skip
        return out

    return attend
