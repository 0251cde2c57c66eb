"""Keys that follow their tokens to another position: what a rotary embedding did to them is undone, and done anew.

Rotary embeddings (Su et al. 2104.09864) turn pairs of a key's elements by angles proportional to its position, so that
R(j - i) R(i) k = R(j) k: a stored key moves without its token being computed again. Families differ in which elements
are pairs, how many turn and in which layers. That is found by trying: what turns a layer's keys from one position into
those the model itself makes at another is right, and where nothing does there is no shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import AttentionStep, Scoring
from paceline.engine.kv_entry import KVEntry, quantize
from paceline.models.positions import has_alibi, shift_refusal

PROBED_TOKENS = 8
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_HALF = 0.03
"""Largest difference of keys, relative to their root mean square in the layer, at which they are the same. Rounding
gives 1e-6 in float32; half precision rounds the model's own cosines, too."""

PROBE = list(range(1, 1 + PROBED_TOKENS))

KeysAt = Callable[[int], Mapping[int, tuple[torch.Tensor, torch.Tensor]]]
"""Keys and values of a few tokens that all stand at one position, by layer: each [kv_heads, tokens, head_dim]."""


@dataclass(frozen=True, eq=False, slots=True)
class Rotation:
    """One rotary embedding: pair n turns by frequencies[n] (float32) for each position.

    Pairs are neighbours if `interleaved`, else element n and the one half of the rotated width further.
    """

    frequencies: torch.Tensor
    interleaved: bool = False

    def angles(self, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
        """[positions, pairs], with float32's rounding, which is the model's own."""
        return positions.to(device, torch.float32)[:, None] * self.frequencies.to(device)

    def turn(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """float32 [kv_heads, n, head_dim], each key turned by its angles [n, pairs]."""
        width = 2 * len(self.frequencies)
        turning, rest = keys[..., :width], keys[..., width:]
        a, b = (turning[..., ::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, dim=-1)
        turned = a * cos - b * sin, a * sin + b * cos
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return torch.cat((joined, rest), dim=-1)


@dataclass(frozen=True, eq=False, slots=True)
class KeyShift:
    """How each layer's keys move; None where they know nothing of positions."""

    rotations: tuple[Rotation | None, ...]

    @torch.inference_mode()
    def move(self, entry: KVEntry, first: int, end: int, by: int) -> None:
        """Bring the tokens at [first, end) of an entry `by` positions forward, over whatever is there."""
        before = torch.arange(first, end)
        turns = {rotation: _turns(rotation, before, before - by, entry.keys.device) for rotation in self._distinct()}
        source, target = entry.at(slice(first, end)), entry.at(slice(first - by, end - by))
        for layer, rotation in enumerate(self.rotations):
            if rotation is None:
                entry.keys[layer, :, target] = entry.keys[layer, :, source].clone()
                if entry.scales is not None:
                    entry.scales[0][layer, :, target] = entry.scales[0][layer, :, source].clone()
            elif entry.scales is None:
                turned = rotation.turn(entry.keys[layer, :, source].float(), *turns[rotation])
                entry.keys[layer, :, target] = turned.to(entry.keys.dtype)
            else:
                numbers, scales = entry.keys[layer, :, source], entry.scales[0][layer, :, source]
                turned = rotation.turn(numbers * scales[..., None], *turns[rotation])
                entry.keys[layer, :, target], entry.scales[0][layer, :, target] = quantize(turned)
            entry.values[layer, :, target] = entry.values[layer, :, source].clone()
            if entry.scales is not None:
                entry.scales[1][layer, :, target] = entry.scales[1][layer, :, source].clone()

    def _distinct(self) -> set[Rotation]:
        return {rotation for rotation in self.rotations if rotation is not None}


@dataclass(frozen=True, slots=True)
class KeyReader(AttentionStep):
    """Attends to nothing and keeps what the layers bring: keys and values, each [kv_heads, tokens, head_dim]."""

    brought: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,  # noqa: ARG002  (positions do not depend on it)
    ) -> torch.Tensor:
        self.brought[layer] = key[0], value[0]
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))


def found_key_shift(model: PreTrainedModel, layers: int, last: int, keys_at: KeysAt) -> KeyShift | str:
    """How a model's keys move, up to position `last`; or why they cannot."""
    refusal = shift_refusal(model.config)
    if refusal is not None:
        return refusal
    if has_alibi(model.config):
        return KeyShift((None,) * layers)
    positions = sorted({1, last // 3, last})
    seen = {position: keys_at(position) for position in (0, *positions)}
    candidates = [None, *_candidates(model)]
    found = []
    for layer in range(layers):
        keys = {position: each[layer][0].float() for position, each in seen.items()}
        values = {position: each[layer][1].float() for position, each in seen.items()}
        if any(_differs(values[0], values[position], model.dtype) for position in positions):
            return f"its layer {layer} sees positions in the values, too"
        right = (one for one in candidates if _turns_into(one, keys, model.dtype))
        rotation = next(right, "none")
        if isinstance(rotation, str):
            return f"the keys of its layer {layer} do not turn as those of a rotary embedding do"
        found.append(rotation)
    return KeyShift(tuple(found))


def _turns(
    rotation: Rotation, before: torch.Tensor, after: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of what leads from the angles at one position to those at another, each [positions, pairs]."""
    turn = rotation.angles(after, device).double() - rotation.angles(before, device).double()
    return turn.cos().float(), turn.sin().float()


def _candidates(model: PreTrainedModel) -> Iterator[Rotation]:
    """Every rotary embedding among the model's modules, with both kinds of pairs."""
    text = model.config.get_text_config(decoder=True)
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1
    ]
    width = getattr(text, "rotary_dim", None)
    if not buffers and width:  # GPT-J's tables, which have no frequencies of their own
        buffers = [1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.int64) / width)]
    distinct: list[torch.Tensor] = []
    for buffer in buffers:
        if not any(torch.equal(buffer.float(), other) for other in distinct):
            distinct.append(buffer.float())
    for frequencies in distinct:
        yield Rotation(frequencies)
        yield Rotation(frequencies, interleaved=True)


def _turns_into(rotation: Rotation | None, keys: Mapping[int, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether it makes of the keys at position 0 those at all other positions."""
    start = keys[0]
    if rotation is not None and 2 * len(rotation.frequencies) > start.shape[-1]:
        return False
    for position, expected in keys.items():
        made = start
        if rotation is not None:
            at = torch.tensor([position])
            made = rotation.turn(start, *_turns(rotation, torch.zeros_like(at), at, start.device))
        if _differs(made, expected, dtype):
            return False
    return True


def _differs(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    spread: Any = b.square().mean().sqrt()
    return not float((a - b).abs().max()) <= TOLERANCE.get(dtype, TOLERANCE_HALF) * float(spread)
