"""Attention over a ragged batch, registered with Transformers so that its modelling code stays untouched.

All windows of a step are laid end to end as one row of tokens: [1, tokens]. Projections, norms and MLPs see
one dense matrix; only attention must know where a sequence begins, and that is what this module adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface

from paceline.engine.kv_entry import KVEntry
from paceline.errors import ModelError

ATTENTION_NAME = "paceline_ragged"

_flash = torch.ops.aten._scaled_dot_product_flash_attention
"""PyTorch's own way to it for a causal mask of the lower right (`torch.nn.attention.bias`)."""

_UNSUPPORTED = ("position_bias",)
"""Arguments by which a family changes the scores; running without them would be silently wrong."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one sequence in one step: a prefill chunk, a decode step or a verification.

    Their keys and values go to positions entry.held, entry.held + 1, … of `entry`, which are the positions the model
    sees; if `ahead`, so many later: behind windows that are under way. Logits are computed for the last `sample`
    tokens.
    """

    entry: KVEntry
    token_ids: Sequence[int]
    sample: int
    ahead: int = 0

    @property
    def start(self) -> int:
        return self.entry.held + self.ahead

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def first_visible(self, sliding_window: int | None) -> int:
        """The first position that any row sees."""
        return 0 if sliding_window is None else max(0, self.start - sliding_window + 1)

    def causal_mask(self, sliding_window: int | None, device: torch.device, first: int = 0) -> torch.Tensor | None:
        """True where a row's position may see position j in [first, end); None if the one row sees everything."""
        if len(self.token_ids) == 1 and (sliding_window is None or self.end - first <= sliding_window):
            return None
        i = torch.arange(self.start, self.end, device=device)[:, None]
        j = torch.arange(first, self.end, device=device)[None, :]
        mask = j <= i
        return mask if sliding_window is None else mask & (j > i - sliding_window)


class Told(Enum):
    """A mask that is told to a kernel, not spelled out."""

    CAUSAL = "causal"
    """The last row sees all keys, each row above it one less."""


Mask = torch.Tensor | Told | None


@dataclass(frozen=True, slots=True)
class Scoring:
    """How one layer scores keys: softmax(cap · tanh(scale · q·k / cap)) over those within its sliding window.

    `softcap` is Gemma 2's cap (2408.00118). `sinks`, [heads], are gpt-oss's: one more logit a head that takes its
    share of the softmax and gives nothing.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether `scaled_dot_product_attention` computes it."""
        return self.softcap is None and self.sinks is None


class AttentionStep(ABC):
    """What the attention layers of one forward pass work on."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """One layer. `query` is [1, heads, tokens, head_dim], `key` and `value` [1, kv_heads, tokens, head_dim];
        returns [1, heads, tokens, head_dim]."""


@dataclass(frozen=True, slots=True)
class RaggedBatch(AttentionStep):
    """The windows of one step. Writes keys and values, then attends window by window over the true length; `eager`
    with every score at hand, in place of a fused kernel."""

    windows: Sequence[Window]
    eager: bool = False
    _masks: dict[tuple[int, int | None, bool], Mask] = field(default_factory=dict)
    """By window, sliding window and kernel: made once a step, not once a layer."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        outputs = []
        offset = 0
        for number, window in enumerate(self.windows):
            rows = slice(offset, offset + len(window.token_ids))
            window.entry.write(layer, window.start, key[0, :, rows], value[0, :, rows])
            seen = slice(window.first_visible(scoring.sliding_window), window.end)
            keys, values = window.entry.read(layer, seen, query.dtype)
            mask = self._mask(number, scoring, query)
            attend = _attend_explicitly if self.eager else _attend
            outputs.append(attend(query[:, :, rows], keys[None], values[None], mask, scoring))
            offset = rows.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _mask(self, number: int, scoring: Scoring, query: torch.Tensor) -> Mask:
        at = (number, scoring.sliding_window, scoring.fused)
        if at not in self._masks:
            window, sliding_window = self.windows[number], scoring.sliding_window
            plain = len(window.token_ids) > 1 and sliding_window is None and scoring.fused
            if plain and not self.eager and _flash_takes(query):
                self._masks[at] = Told.CAUSAL
            else:
                first = window.first_visible(sliding_window)
                self._masks[at] = window.causal_mask(sliding_window, query.device, first)
        return self._masks[at]


def _flash_takes(query: torch.Tensor) -> bool:
    """Whether FlashAttention runs here, and takes heads of this size as they are."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and can_use_flash_attention(SDPAParams(query, query, query, None, 0.0, True, False))
    )


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask, scoring: Scoring
) -> torch.Tensor:
    if isinstance(mask, Told):
        # With a mask spelled out it takes seven times as long (6 rows on an H100); `is_causal` is of the upper left.
        found: torch.Tensor = _flash(query, keys, values, is_causal=True, scale=scoring.scale)[0]
        return found
    if not scoring.fused:
        return _attend_explicitly(query, keys, values, mask, scoring)
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scoring.scale, enable_gqa=grouped)


def _attend_explicitly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask, scoring: Scoring
) -> torch.Tensor:
    """The same with every score at hand, for what no fused kernel here computes."""
    assert not isinstance(mask, Told)
    groups = query.view(1, keys.shape[1], -1, *query.shape[2:])
    scores = (groups @ keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]].to(values.dtype)
    return (weights.view(1, keys.shape[1], -1, *weights.shape[2:]) @ values.unsqueeze(2)).flatten(1, 2)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  (ours is made per window)
    *,
    paceline_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What Transformers calls: `query` is [1, heads, tokens, head_dim]; returns [1, tokens, heads, head_dim].

    Raises ModelError for a family whose scores need more than this, or that does not hand on `paceline_step`.
    """
    kind = type(module).__name__
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(f"attention with {name} is not supported ({kind})")
    if paceline_step is None:
        raise ModelError(f"{kind} does not hand its arguments on to the attention function")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ModelError(f"{kind} does not know its layer's number")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    scoring = Scoring(scale, sliding_window or None, softcap, s_aux)
    return paceline_step.attend(layer, query, key, value, scoring).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, ragged_attention)
