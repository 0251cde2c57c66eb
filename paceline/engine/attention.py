"""Attention over a ragged batch, registered with Transformers so that its modelling code stays untouched.

All windows of a step are laid end to end as one row of tokens: [1, tokens]. Projections, norms and MLPs see
one dense matrix; only attention must know where a sequence begins, and that is what this module adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from paceline.engine.kv_cache import KVEntry
from paceline.errors import ModelError

ATTENTION_NAME = "paceline_ragged"

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments by which a family changes the scores; running without them would be silently wrong."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one sequence in one step: a prefill chunk, a decode step or a verification.

    Their keys and values go to positions entry.length, entry.length + 1, … of `entry`. Logits are computed
    for the last `sample` tokens.
    """

    entry: KVEntry
    token_ids: Sequence[int]
    sample: int

    @property
    def start(self) -> int:
        return self.entry.length

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def causal_mask(self, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
        """True where a row's position may see position j in [0, end); None if the one row sees everything."""
        if len(self.token_ids) == 1 and (sliding_window is None or self.end <= sliding_window):
            return None
        i = torch.arange(self.start, self.end, device=device)[:, None]
        j = torch.arange(self.end, device=device)[None, :]
        mask = j <= i
        return mask if sliding_window is None else mask & (j > i - sliding_window)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  (always None: ours is made per window)
    *,
    windows: Sequence[Window],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values, then attend window by window over the true length.

    `query` is [1, heads, tokens, head_dim], `key` and `value` [1, kv_heads, tokens, head_dim]; returns
    [1, tokens, heads, head_dim]. Raises ModelError for a family whose scores need more than this.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(f"attention with {name} is not supported yet ({type(module).__name__})")
    layer: int = module.layer_idx  # type: ignore[assignment]
    outputs = []
    offset = 0
    for window in windows:
        rows = slice(offset, offset + len(window.token_ids))
        keys, values = window.entry.keys[layer], window.entry.values[layer]
        keys[:, window.start : window.end] = key[0, :, rows]
        values[:, window.start : window.end] = value[0, :, rows]
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, rows],
                keys[None, :, : window.end],
                values[None, :, : window.end],
                attn_mask=window.causal_mask(sliding_window, query.device),
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
        offset = rows.stop
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, ragged_attention)
