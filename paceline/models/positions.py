"""How a model knows positions, as far as its configuration tells: whether a streaming window can move its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_BY_LENGTH = ("longrope", "dynamic")
"""Rotary embeddings that change with the length of the text: a key cannot be turned from one position to another."""


def has_alibi(config: PretrainedConfig) -> bool:
    """Whether distances enter attention's scores, and positions nothing else (2108.12409)."""
    text = config.get_text_config(decoder=True)
    alibi = getattr(text, "alibi", None)
    if alibi is None:
        attention: Any = getattr(text, "attn_config", None)
        alibi = getattr(attention, "alibi", text.model_type == "bloom")
    return bool(alibi)


def rope_types(config: PretrainedConfig) -> list[str]:
    """The kinds of rotary embedding (2104.09864) in its layers; none if it has no such embedding."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return ["default"] if getattr(text, "rotary_dim", None) else []
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    return [str(one["rope_type"]) for one in each if one.get("rope_type")]


def shift_refusal(config: PretrainedConfig) -> str | None:
    """Why no streaming window is possible with such a model, or None."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "attention_chunk_size", None):
        return f"{text.model_type} attends in chunks that begin at fixed positions"
    if has_alibi(config):
        return None
    kinds = rope_types(config)
    if not kinds:
        return f"{text.model_type} has learned positions, which are added to a token once and cannot be changed after"
    by_length = next((kind for kind in kinds if kind in ROPE_BY_LENGTH), None)
    return f"its {by_length} rotary embedding depends on the length of the text" if by_length else None
