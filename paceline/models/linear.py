"""Linear layers on a CPU: FBGEMM products over half-precision weights.

A decode step reads every weight once, so its floor is bytes over bandwidth. FBGEMM keeps weights in fp16 and
accumulates in float32: half the bytes of fp32, and, unlike MKL's product, a few rows cost what one row costs,
which is what makes verifying several candidates at once worth it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Fp16Linear(nn.Module):
    """y = x W^T + b with W packed in fp16; x and y are float32 [..., features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = fp16_product(
            linear.weight.detach().float(), None if linear.bias is None else linear.bias.float()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def fp16_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> x W^T + b over a packed copy of W [out, in] in FBGEMM's own tiling; the original is free to go."""
    packed = torch.ops.quantized.linear_prepack_fp16(
        weight.detach().clone(), None if bias is None else bias.detach().clone()
    )
    linear = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: linear(x, packed)


def fbgemm_available() -> bool:
    """Whether this build of torch has FBGEMM and the CPU runs it."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def exact_in_fp16(model: nn.Module) -> bool:
    """Whether every linear weight is a half-precision number, so that packing loses nothing."""
    return all(bool((w.half().to(w.dtype) == w).all()) for w in (linear.weight for _, linear in _linears(model)))


def use_fp16_linears(model: nn.Module) -> int:
    """Replace every nn.Linear in place; returns how many. Weights shared with an embedding stay there too."""
    found = _linears(model)
    for name, linear in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Fp16Linear(linear))
    return len(found)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
