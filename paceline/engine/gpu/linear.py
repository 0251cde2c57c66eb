"""Matrix products of a step on a GPU: which way is fastest depends on how many rows there are.

A few rows take the time in which the weights are read, and what is done before and after is done on the way
(`rows_linear`). From some rows on cuBLAS multiplies faster, and what surrounds the product runs apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paceline.engine.gpu import kernels
from paceline.engine.gpu.attention import Scratch

MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a launch of `rows_linear`; measured on an H100 (benchmarks/gpu_kernels.py)."""

    out: int
    inputs: int
    split: int
    warps: int
    stages: int


def tiles_for(rows: int, outputs: int, inputs: int, *, gated: bool, normed: bool) -> Tiles | None:
    """None where cuBLAS is faster: `rows` is 16, 32 or 64."""
    if normed and not gated:
        if outputs >= 2**15:
            return Tiles(128, 64, 1, 8, 4) if rows == 64 else Tiles(64, 128, 1, 8, 4)
        return Tiles(64, 128, 2, 8, 4) if rows == 16 else None
    if gated:
        return Tiles(64, 128, 1, 8, 4)
    if rows == 64:
        return Tiles(64, 128, 2, 8, 4) if inputs > outputs else None
    programs = -(-outputs // 32)
    split = 1 if programs >= 128 else 2 if programs >= 64 else 4
    return Tiles(32, 256, split, 4, 3 if split > 1 else 4)


class Linears:
    """A layer's products with what surrounds them. `x` is [rows, inputs], bfloat16 or float16; weights [outputs,
    inputs] of the same type."""

    def __init__(self, eps: float, scratch: Scratch) -> None:
        self._eps, self._scratch = eps, scratch

    def normed(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm(x) W^T + b; in `out`, of any type, if it is given."""
        tiles = self._tiles(x, weight.shape[0], weight.shape[1], normed=True)
        if tiles is not None:
            out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
            return self._launch(tiles, x, weight, out, norm=norm, bias=bias)
        found = F.linear(self._norm(x, norm), weight, bias)
        return found if out is None else out.copy_(found)

    def gated(
        self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """silu(g) u of (g, u) = RMSNorm(x) W^T + b; W has the gates above the ups."""
        outputs = weight.shape[0] // 2
        out = x.new_empty(x.shape[0], outputs)
        tiles = self._tiles(x, outputs, weight.shape[1], gated=True, normed=True) if bias is None else None
        if tiles is not None:
            return self._launch(tiles, x, weight, out, norm=norm, gated=True)
        both = F.linear(self._norm(x, norm), weight, bias)
        block = 1024
        kernels.gate_rows[(x.shape[0], -(-outputs // block))](both, out, outputs, BLOCK=block)
        return out

    def added(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """x + scale (y W^T + b), in place of `x`."""
        tiles = self._tiles(y, weight.shape[0], weight.shape[1]) if scale == 1.0 else None
        if tiles is not None:
            return self._launch(tiles, y, weight, x, residual=x, bias=bias)
        if scale == 1.0 and bias is None:
            return torch.addmm(x, y, weight.T, out=x)
        return x.add_(F.linear(y, weight, bias), alpha=scale)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        width = x.shape[1]
        kernels.norm_rows[(x.shape[0],)](
            x, weight, out, width, self._eps, WIDE=1 << (width - 1).bit_length(), num_warps=8
        )
        return out

    def _tiles(
        self, x: torch.Tensor, outputs: int, inputs: int, *, gated: bool = False, normed: bool = False
    ) -> Tiles | None:
        if x.shape[0] > MOST_ROWS:
            return None
        return tiles_for(_rows(x.shape[0]), outputs, inputs, gated=gated, normed=normed)

    def _launch(
        self,
        tiles: Tiles,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        gated: bool = False,
    ) -> torch.Tensor:
        count, inputs, outputs = x.shape[0], weight.shape[1], out.shape[1]
        rows, programs = _rows(count), -(-outputs // tiles.out)
        size = programs * tiles.split * (tiles.out + 1) * rows if tiles.split > 1 else 0
        kernels.rows_linear[(programs, tiles.split)](
            x, weight, bias, norm, residual, out, count, outputs, inputs, self._eps, x.stride(0), out.stride(0),
            NORMED=norm is not None, GATED=gated, BIASED=bias is not None, ADDED=residual is not None,
            ROWS=rows, BLOCK_OUT=tiles.out, BLOCK_IN=tiles.inputs, SPLIT=tiles.split,
            partial=self._scratch.floats("linear", size), counters=self._scratch.counters("linear done", programs),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return out


def _rows(count: int) -> int:
    return 16 if count <= 16 else 32 if count <= 32 else 64
