"""Models whose attention cannot be replaced: one forward pass a sequence, over a cache that is our KV entry.

Such a model is handed a Transformers cache whose layers write into the entry's slab at the window's positions
and return views of it. So the scheduler, the prefix cache, truncation and speculation serve it like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from paceline.engine.attention import Window
from paceline.engine.geometry import Seen, kv_geometry
from paceline.engine.runner import TransformersRunner
from paceline.errors import ModelError
from paceline.models.spread import main_device

OBSERVED_TOKENS = 4


class WindowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a window's entry, as a Transformers cache layer.

    `copies` is how many times in a row the model brings each head: Falcon expands grouped heads before it
    caches them. One is kept.
    """

    is_sliding = False

    def __init__(self, window: Window, layer: int, copies: int) -> None:
        super().__init__()
        self._window, self._layer, self._copies = window, layer, copies
        self._length, self._end = window.start, window.end
        self.keys, self.values = window.entry.keys[layer, None], window.entry.values[layer, None]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The entry is there already."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002  (Transformers' signature)
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the window's keys and values, [1, kv_heads, tokens, head_dim]; all of the sequence's so far."""
        entry = self._window.entry
        entry.write(self._layer, self._window.start, key_states[0, :: self._copies], value_states[0, :: self._copies])
        self._length = self._end
        read = entry.read(self._layer, slice(0, self._end), key_states.dtype)
        keys, values = (each[None].to(key_states.device) for each in read)
        if self._copies == 1:
            return keys, values
        return keys.repeat_interleave(self._copies, dim=1), values.repeat_interleave(self._copies, dim=1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` returns."""
        return self._window.start + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        """No limit, in Transformers' words."""
        return -1


class PerSequenceRunner(TransformersRunner):
    """Runs a Transformers causal language model with its own attention, window after window.

    `why` says why its attention is not ours. Raises ModelError if the model does not use a KV cache as expected.
    """

    def __init__(self, model: PreTrainedModel, why: str = "") -> None:
        self.model = model
        self.why = why
        self._accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in self._accepted:
            raise ModelError(f"{type(model).__name__} takes no KV cache")
        layers = self._observe()
        brought = kv_geometry({n: Seen(tuple(k.shape), tuple(v.shape)) for n, (k, v) in layers.items()}, model)
        self._copies = _copies([tensor for pair in layers.values() for tensor in pair])
        self._geometry = replace(brought, num_kv_heads=brought.num_kv_heads // self._copies)

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        return torch.cat([self._run_one(window) for window in windows])

    def _run_one(self, window: Window) -> torch.Tensor:
        ids, positions, rows = self.flatten([window])
        cache = Cache(layers=[WindowLayer(window, n, self._copies) for n in range(self._geometry.num_layers)])
        # Models with ALiBi take positions from this mask, models with learned ones may.
        attended = torch.ones((1, window.end), dtype=torch.long, device=self.device)
        wanted = {
            "position_ids": positions[None],
            "cache_position": positions,
            "attention_mask": attended,
            "logits_to_keep": rows,
        }
        passed = {name: value for name, value in wanted.items() if name in self._accepted}
        output = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True, **passed)
        logits: torch.Tensor = output.logits[0]
        return (logits if "logits_to_keep" in passed else logits[rows]).float()

    @torch.inference_mode()
    def _keys_at(self, position: int) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
        ids, positions = self._probe_at(position)
        cache = DynamicCache()
        passed = {"position_ids": positions} if "position_ids" in self._accepted else {}
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, **passed)
        return {n: (layer.keys[0], layer.values[0]) for n, layer in enumerate(cache.layers)}

    @torch.inference_mode()
    def _observe(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a few tokens, by layer."""
        cache = DynamicCache()
        ids = torch.arange(1, 1 + OBSERVED_TOKENS, device=main_device(self.model)) % self.vocab_size
        self.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
        written = {n: layer for n, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}
        return {n: (layer.keys, layer.values) for n, layer in written.items()}


def _copies(brought: list[torch.Tensor]) -> int:
    """How many neighbouring heads, [1, heads, tokens, head_dim], are equal to the last bit in all of `brought`."""
    heads = brought[0].shape[1]
    for copies in (n for n in range(heads, 1, -1) if heads % n == 0):
        if all(torch.equal(one[:, ::copies].repeat_interleave(copies, dim=1), one) for one in brought):
            return copies
    return 1
