"""Attention kernels of others that read keys and values in blocks, behind one signature.

None of them knows sinks or slopes. A prompt's windows and those of decoding are one call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from paceline.engine.attention import Scoring
from paceline.engine.gpu.inputs import Batch
from paceline.engine.gpu.kinds import FLASH_3
from paceline.errors import ModelError

Library = Callable[[Batch, int, Scoring, torch.Tensor], torch.Tensor]
"""(batch, layer, scoring, q [rows, heads, dim]) to [rows, heads * dim]; keys and values are stored already."""


def attention(name: str) -> Library:
    """`flash_attention_3` or `varlen_attn`; `paceline.engine.gpu.kinds.missing` has said that it is there."""
    return {"flash_attention_3": _flash_3, "varlen_attn": _varlen}[name]()


def _flash_3() -> Library:
    flash: Any = None
    for module, _ in FLASH_3:
        try:
            flash = importlib.import_module(module).flash_attn_with_kvcache
            break
        except ImportError:
            continue
    if flash is None:
        raise ModelError("FlashAttention-3 does not import")

    def attend(batch: Batch, layer: int, scoring: Scoring, q: torch.Tensor) -> torch.Tensor:
        found = flash(
            q,
            *_in_blocks(batch, layer),
            cache_seqlens=batch.ends,
            page_table=batch.tables,
            cu_seqlens_q=batch.bounds,
            max_seqlen_q=batch.longest,
            softmax_scale=scoring.scale,
            causal=True,
            window_size=_window(scoring),
            softcap=scoring.softcap or 0.0,
        )
        attended: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return attended.flatten(1)

    return attend


def _varlen() -> Library:
    from torch.nn.attention import varlen

    def attend(batch: Batch, layer: int, scoring: Scoring, q: torch.Tensor) -> torch.Tensor:
        if scoring.softcap is not None:
            raise ModelError("varlen_attn caps no scores")
        call: Any = varlen.varlen_attn
        keys, values = _in_blocks(batch, layer)
        found: torch.Tensor = call(
            q,
            keys,
            values,
            batch.bounds,
            None,
            batch.longest,
            batch.tables.shape[1] * batch.block,
            scale=scoring.scale,
            window_size=(_window(scoring)[0], 0),
            enable_gqa=q.shape[1] != keys.shape[2],
            block_table=batch.tables,
            seqused_k=batch.ends,
        )
        return found.flatten(1)

    return attend


def _in_blocks(batch: Batch, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's keys and values, [blocks, block, kv_heads, dim]."""
    shape = (-1, batch.block, *batch.keys.shape[2:])
    return batch.keys[layer].view(shape), batch.values[layer].view(shape)


def _window(scoring: Scoring) -> tuple[int, int]:
    """How far a row sees to the left and to the right, -1: all."""
    return (-1, -1) if scoring.sliding_window is None else (scoring.sliding_window - 1, 0)
