"""The shape of a model's keys and values, seen by running one token through it.

Families name these numbers differently (`num_key_value_heads`, `multi_query`, `n_head`, …) and some store other
heads than their configuration says. What arrives at the cache is what has to fit into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import AttentionStep, Scoring
from paceline.engine.kv_cache import KVGeometry
from paceline.errors import ModelError
from paceline.models.positions import ROPE_BY_LENGTH
from paceline.models.spread import main_device

DEFAULT_MAX_MODEL_LEN = 2048
"""For models that state no limit (ALiBi has none): what BLOOM and MPT were trained at."""

_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "n_ctx")


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's call: the shapes of key and value, and the sliding window."""

    key: tuple[int, ...]
    value: tuple[int, ...]
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class Observer(AttentionStep):
    """Attends to nothing and notes what the layers bring."""

    seen: dict[int, Seen] = field(default_factory=dict)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        if layer in self.seen:
            raise ModelError(f"layer {layer} attends twice")
        self.seen[layer] = Seen(tuple(key.shape), tuple(value.shape), scoring.sliding_window)
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))


def text_config(model: PreTrainedModel) -> Any:
    """The part of the configuration that describes the decoder."""
    return model.config.get_text_config(decoder=True)


def kv_geometry(seen: Mapping[int, Seen], model: PreTrainedModel) -> KVGeometry:
    """What one token takes in the KV cache. Raises ModelError, with the reason, if it is not one shape for all."""
    layers = int(getattr(text_config(model), "num_hidden_layers", len(seen)))
    if sorted(seen) != list(range(layers)):
        raise ModelError(f"only {len(seen)} of its {layers} layers keep keys and values")
    shapes = {shape for call in seen.values() for shape in (call.key, call.value)}
    if len(shapes) != 1:
        raise ModelError(f"its layers keep keys and values of different shapes: {sorted(shapes)}")
    _, heads, _, head_dim = shapes.pop()
    return KVGeometry(layers, heads, head_dim, model.dtype, main_device(model))


def max_model_len(model: PreTrainedModel) -> int:
    """Longest prompt plus output, in tokens, that the model's positions are good for.

    A rotary embedding that changes with the length ("longrope", "dynamic") would make a token's keys depend on
    what else is in the batch, and on when they were computed: such a model runs up to the length at which it changes.
    """
    config = text_config(model)
    stated = [getattr(config, name, None) for name in _LIMITS]
    limit = next((int(found) for found in stated if found), DEFAULT_MAX_MODEL_LEN)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if one.get("rope_type") in ROPE_BY_LENGTH:
            original = one.get("original_max_position_embeddings")
            limit = min(limit, int(original or getattr(config, "original_max_position_embeddings", None) or limit))
    return limit
