"""Quantized checkpoints made by hand: integers and scales that are known, laid out as each method's files have them.

Words are put together here number by number, which is slow, and not how `paceline.models.unpacking` takes them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests import tiny

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of eight neighbouring outputs, the one that lies in each nibble of a word, lowest first."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Integers:
    """One layer: w[o, i] = scale[g[i], o] (q[o, i] - zero[g[i], o])."""

    q: torch.Tensor
    zero: torch.Tensor
    scale: torch.Tensor
    groups: torch.Tensor
    bits: int

    @property
    def weight(self) -> torch.Tensor:
        return (self.scale.float()[self.groups] * (self.q.T - self.zero[self.groups])).T.contiguous()


def integers(
    outputs: int, inputs: int, *, bits: int = 4, group: int = 32, symmetric: bool = False, act_order: bool = False
) -> Integers:
    """Random ones; a symmetric layer's zero points are all in the middle. Zero points begin at 1: GPTQ's first format
    cannot store a 0."""
    generator = torch.Generator().manual_seed(outputs * inputs + group)
    levels, count = 2**bits, inputs // group
    q = torch.randint(levels, (outputs, inputs), generator=generator)
    zero = torch.randint(1, levels, (count, outputs), generator=generator)
    if symmetric:
        zero = torch.full_like(zero, levels // 2)
    scale = (torch.rand(count, outputs, generator=generator) * 0.05 + 0.01) * 16 / levels
    groups = torch.arange(inputs) // group
    if act_order:
        groups = groups[torch.randperm(inputs, generator=generator)]
    return Integers(q, zero, scale.half(), groups, bits)


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of integers in 32-bit words, lowest bits first."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        row += [0] * (-len(row) % per_word)
        found = [sum(row[start + n] << (bits * n) for n in range(per_word)) for start in range(0, len(row), per_word)]
        rows.append(np.array(found, dtype=np.uint64).astype(np.uint32).view(np.int32))
    return torch.tensor(np.stack(rows))


def gptq(layer: Integers, *, v2: bool = False, with_g_idx: bool = True) -> Tensors:
    found = {
        "qweight": words(layer.q, layer.bits).T.contiguous(),
        "qzeros": words(layer.zero - (0 if v2 else 1), layer.bits),
        "scales": layer.scale,
    }
    return found | ({"g_idx": layer.groups.int()} if with_g_idx else {})


def awq(layer: Integers) -> Tensors:
    def interleaved(values: torch.Tensor) -> torch.Tensor:
        return words(values.reshape(len(values), -1, 8)[..., list(AWQ_ORDER)].flatten(1), 4)

    return {"qweight": interleaved(layer.q.T), "qzeros": interleaved(layer.zero), "scales": layer.scale}


def packed(layer: Integers, *, symmetric: bool = False) -> Tensors:
    """compressed-tensors' pack-quantized: integers around 0, stored from 0 on."""
    found = {
        "weight_packed": words(layer.q, layer.bits),
        "weight_shape": torch.tensor(layer.q.shape),
        "weight_scale": layer.scale.T.contiguous(),
    }
    if symmetric:
        return found
    return found | {"weight_zero_point": words(layer.zero, layer.bits).T.contiguous()}


def plain_integers(layer: Integers) -> Tensors:
    """compressed-tensors' int-quantized, with one scale for each output."""
    return {"weight": (layer.q - 128).to(torch.int8), "weight_scale": layer.scale.T.contiguous()}


def write(
    path: Path, settings: Mapping[str, Any], pack: Callable[[Integers], Tensors], *, whole: bool = False, **kind: Any
) -> LlamaForCausalLM:
    """A tiny model in the folder, its layers' linear weights quantized; the same model with the weights they mean.

    With `whole` a layer's inputs are one group.
    """
    model = tiny.tiny_llama(**SHAPE)
    model.save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            groups = {"group": parameter.shape[1]} if whole else {}
            layer = integers(*parameter.shape, **kind | groups)
            parameter.copy_(layer.weight)
            del stored[name]
            stored |= {name.removesuffix("weight") + last: tensor for last, tensor in pack(layer).items()}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": dict(settings)}
    (path / "config.json").write_text(json.dumps(config))
    return model


def compressed_settings(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
