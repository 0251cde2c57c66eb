"""From a quantized layer's tensors to its weight: the packings of GPTQ, AWQ and compressed-tensors.

All of them mean w[o, i] = s (q - z), with a scale s and a zero point z for each group of inputs; they differ in where
the integers lie. Products are computed in float32, in which they are exact.

    GPTQ                qweight [in · b/32, out], qzeros [groups, out · b/32], scales [groups, out], g_idx [in]
    AWQ                 qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]
    compressed-tensors  weight_packed [out, in · b/32], or weight [out, in] of integers or small floats;
                        weight_scale [out, groups] or less; weight_zero_point; weight_g_idx [in]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD = 32
AWQ_BITS = 4
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""At which nibble of its word, lowest first, each of eight neighbouring outputs lies."""

Tensors = Mapping[str, "torch.Tensor"]
"""A layer's tensors by their last name."""
Shapes = Mapping[str, tuple[int, ...]]


def integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers, uint8 [rows, columns · 32 / `bits`], of words [rows, columns] that hold neighbours in a row,
    lowest bits first."""
    import torch

    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    found: torch.Tensor = (packed.int().contiguous().view(torch.uint8)[..., None] >> places) & (2**bits - 1)
    return found.flatten(-2)


def gptq_bits(shapes: Shapes) -> float:
    """Bits of a layer's integers, whatever the checkpoint's configuration says of other layers."""
    return WORD * shapes["qzeros"][1] / shapes["scales"][1]


def gptq_shape(shapes: Shapes) -> tuple[int, int]:
    return int(shapes["qweight"][0] * WORD / gptq_bits(shapes)), shapes["scales"][1]


def gptq(tensors: Tensors, group_size: int, zero_offset: int) -> torch.Tensor:
    """float32 [out, in]. `zero_offset` is what was taken from zero points when they were packed: 1 in GPTQ's first
    format. Without `g_idx` groups are `group_size` inputs in order, -1 all of them."""
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    bits, (inputs, _) = int(gptq_bits(shapes)), gptq_shape(shapes)
    weight = integers(tensors["qweight"].T, bits).float()
    zeros = ((integers(tensors["qzeros"], bits) + zero_offset) & (2**bits - 1)).float().T
    scales = tensors["scales"].float().T
    count = scales.shape[1]
    if group_size == -1 or -(-inputs // group_size) != count:  # layers may differ from the configuration
        group_size = -(-inputs // count)
    in_order = torch.arange(inputs) // group_size
    groups = tensors.get("g_idx", in_order).long()
    if torch.equal(groups, in_order) and inputs % count == 0:
        _scale_groups(weight, scales, zeros)
        return weight
    return weight.sub_(zeros[:, groups]).mul_(scales[:, groups])


def _scale_groups(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """In place, of [out, in] with scales and zero points [out, groups] of equal groups in order."""
    weight.view(*scales.shape, -1).sub_(zeros[..., None]).mul_(scales[..., None])


def awq_shape(shapes: Shapes) -> tuple[int, int]:
    return shapes["qweight"][0], shapes["qweight"][1] * WORD // AWQ_BITS


def awq(tensors: Tensors) -> torch.Tensor:
    """float32 [out, in]."""
    weight, zeros = (_awq_integers(tensors[name]).float().T for name in ("qweight", "qzeros"))
    weight = weight.contiguous()
    _scale_groups(weight, tensors["scales"].float().T, zeros)
    return weight


def _awq_integers(packed: torch.Tensor) -> torch.Tensor:
    found = integers(packed, AWQ_BITS)
    return found.view(*packed.shape, len(AWQ_PLACES))[..., list(AWQ_PLACES)].flatten(-2)


def compressed(tensors: Tensors, block: tuple[int, int] | None = None) -> torch.Tensor:
    """float32 [out, in]. `block` is the outputs and inputs that share a scale, where scales are not of one output each
    nor of all."""
    scale, zero = tensors["weight_scale"].float(), tensors.get("weight_zero_point")
    bits = 8
    if (packed := tensors.get("weight_packed")) is None:
        q = tensors["weight"].float()
    else:
        outputs, inputs = (int(size) for size in tensors["weight_shape"])
        bits = WORD * packed.shape[1] // inputs
        q = integers(packed, bits)[:, :inputs].float().sub_(2 ** (bits - 1))
        if zero is not None and tuple(zero.shape) != tuple(scale.shape):
            zero = integers(zero.T, bits)[:, :outputs].T.float().sub_(2 ** (bits - 1))
    groups = tensors.get("weight_g_idx")
    if zero is not None:
        q -= _spread(zero.float(), tuple(q.shape), block, groups)
    return q.mul_(_spread(scale, tuple(q.shape), block, groups))


def _spread(
    values: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, groups: torch.Tensor | None
) -> torch.Tensor:
    """A number for each weight, or what broadcasts to that."""
    if values.numel() == 1:
        return values.reshape(1, 1)
    outputs, inputs = shape
    if values.shape[0] != outputs:
        assert block is not None
        values = values.repeat_interleave(block[0], dim=0)[:outputs]
        return values.repeat_interleave(block[1], dim=1)[:, :inputs]
    if values.dim() == 1 or values.shape[1] == 1:
        return values.reshape(outputs, 1)
    if groups is not None and bool((groups >= 0).all()):
        return values[:, groups.long()]
    return values.repeat_interleave(inputs // values.shape[1], dim=1)
