"""Matrix products of a step on a GPU: which way is fastest depends on how many rows there are.

A few rows take the time in which the weights are read, and what is done before and after is done on the way
(`rows_linear`). From some rows on cuBLAS multiplies faster, and what surrounds the product runs apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from paceline.engine.gpu import kernels
from paceline.engine.gpu.attention import Scratch

MOST_ROWS = 64
AT_ONCE = 4096
"""Rows of a weight that are rounded at once."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a launch of `rows_linear`; as measured on an H100 for the shapes of Llama 1B and 8B."""

    out: int
    inputs: int
    split: int
    warps: int
    stages: int


def tiles_for(
    rows: int, outputs: int, inputs: int, *, gated: bool, normed: bool, in_bytes: bool = False
) -> Tiles | None:
    """None where cuBLAS is faster: `rows` is 16, 32 or 64. Of `in_bytes` weights a tile is as many bytes."""
    if in_bytes:
        return _tiles_in_bytes(rows, outputs, gated=gated, normed=normed)
    if gated:
        return Tiles(64, 128, 1, 8, 4)
    if normed and outputs >= 2**15:
        return Tiles(128, 64, 1, 8, 4) if rows == 64 else Tiles(64, 128, 1, 8, 4)
    if normed:
        return Tiles(64, 128, 4 if outputs <= 6144 else 2, 8, 3) if rows == 16 else None
    if rows == 64:
        return Tiles(64, 128, 2, 8, 4) if inputs > outputs else None
    split = _split(-(-outputs // 32))
    return Tiles(32, 256, split, 4, 3 if split > 1 else 4)


def _tiles_in_bytes(rows: int, outputs: int, *, gated: bool, normed: bool) -> Tiles | None:
    if rows == 64:
        wide = gated or outputs >= 2**15
        return Tiles(64, 128, 1 if wide else _split(-(-outputs // 64)), 8, 3)
    if gated:
        return Tiles(64, 128, 1, 4, 4) if outputs > 2**13 else Tiles(32, 256, 1, 4, 4)
    if normed and outputs >= 2**15:
        return Tiles(128, 128, 1, 8, 3)
    return Tiles(32, 256, 2 if normed and outputs >= 4096 else _split(-(-outputs // 32)), 4, 4 if rows == 16 else 3)


def _split(programs: int) -> int:
    """Among how many programs the inputs are shared, so that there are enough."""
    return 1 if programs >= 128 else 2 if programs >= 96 else 4


@dataclass(frozen=True, slots=True)
class Weight:
    """Of a product: [outputs, inputs] in the activations' type, or int8 with `scales`, float32 [outputs]; a bias."""

    data: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        return int(self.data.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.data.shape[1])

    def rounded(self) -> Weight:
        """In 8 bits, each output's largest magnitude 127."""
        tops = torch.cat([part.abs().amax(dim=1) for part in torch.split(self.data, AT_ONCE)]).float()
        scales = tops.clamp(min=torch.finfo(torch.float32).tiny) / 127
        pieces = zip(torch.split(self.data, AT_ONCE), torch.split(scales, AT_ONCE), strict=True)
        data = torch.cat([(part.float() / scale[:, None]).round().to(torch.int8) for part, scale in pieces])
        return Weight(data, self.bias, scales)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """As numbers of that type."""
        if self.scales is None:
            return self.data
        out = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
        block = 1024
        kernels.widen_rows[(self.outputs, -(-self.inputs // block))](
            self.data, self.scales, out, self.inputs, BLOCK=block
        )
        return out


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a product's programs add what other GPUs computed of other inputs; see `peer_kernels`.

    `slots` and `flags` are addresses on every rank; `slot` and `place` say where in them, `slot_size` is in numbers.
    """

    slots: torch.Tensor
    flags: torch.Tensor
    step: torch.Tensor
    slot: int
    place: int
    limit: int
    rank: int
    size: int
    slot_size: int
    factor: float


class Linears:
    """A layer's products with what surrounds them. `x` is [rows, inputs], bfloat16 or float16."""

    def __init__(self, eps: float, scratch: Scratch, *, overlaps: bool = False) -> None:
        self._eps, self._scratch, self._overlaps = eps, scratch, overlaps

    def normed(
        self, x: torch.Tensor, norm: torch.Tensor, weight: Weight, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RMSNorm(x) W^T + b; in `out`, of any type, if it is given."""
        tiles = self._tiles(x, weight, weight.outputs, normed=True)
        if tiles is not None:
            out = x.new_empty(x.shape[0], weight.outputs) if out is None else out
            return self._launch(tiles, x, weight, out, norm=norm)
        found = F.linear(self._norm(x, norm), weight.whole(x.dtype), weight.bias)
        return found if out is None else out.copy_(found)

    def gated(self, x: torch.Tensor, norm: torch.Tensor, weight: Weight) -> torch.Tensor:
        """silu(g) u of (g, u) = RMSNorm(x) W^T + b; W has the gates above the ups."""
        outputs = weight.outputs // 2
        out = x.new_empty(x.shape[0], outputs)
        tiles = self._tiles(x, weight, outputs, gated=True, normed=True) if weight.bias is None else None
        if tiles is not None:
            return self._launch(tiles, x, weight, out, norm=norm, gated=True)
        both = F.linear(self._norm(x, norm), weight.whole(x.dtype), weight.bias)
        block = 1024
        kernels.gate_rows[(x.shape[0], -(-outputs // block))](both, out, outputs, BLOCK=block)
        return out

    def added(self, x: torch.Tensor, y: torch.Tensor, weight: Weight, scale: float) -> torch.Tensor:
        """x + scale (y W^T + b), in place of `x`."""
        tiles = self._tiles(y, weight, weight.outputs) if scale == 1.0 else None
        if tiles is not None:
            return self._launch(tiles, y, weight, x, residual=x)
        data = weight.whole(x.dtype)
        if scale == 1.0 and weight.bias is None:
            return torch.addmm(x, y, data.T, out=x)
        return x.add_(F.linear(y, data, weight.bias), alpha=scale)

    def added_of_all(self, x: torch.Tensor, y: torch.Tensor, weight: Weight, exchange: Exchange) -> torch.Tensor | None:
        """x + factor times the sum over ranks of y W^T + b, in place of `x`; None where this is not done at once."""
        tiles = self._tiles(y, weight, weight.outputs)
        return None if tiles is None else self._launch(tiles, y, weight, x, residual=x, exchange=exchange)

    def product(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """x W^T + b, in memory of its own."""
        tiles = self._tiles(x, weight, weight.outputs)
        if tiles is not None:
            return self._launch(tiles, x, weight, x.new_empty(x.shape[0], weight.outputs))
        return F.linear(x, weight.whole(x.dtype), weight.bias)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        width = x.shape[1]
        wide = 1 << (width - 1).bit_length()
        kernels.norm_rows[(x.shape[0],)](x, weight, out, width, self._eps, WIDE=wide, num_warps=8)
        return out

    def _tiles(
        self, x: torch.Tensor, weight: Weight, outputs: int, *, gated: bool = False, normed: bool = False
    ) -> Tiles | None:
        if x.shape[0] > MOST_ROWS:
            return None
        in_bytes = weight.scales is not None
        return tiles_for(_rows(x.shape[0]), outputs, weight.inputs, gated=gated, normed=normed, in_bytes=in_bytes)

    def _launch(
        self,
        tiles: Tiles,
        x: torch.Tensor,
        weight: Weight,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gated: bool = False,
        exchange: Exchange | None = None,
    ) -> torch.Tensor:
        count, outputs = x.shape[0], out.shape[1]
        rows, programs = _rows(count), -(-outputs // tiles.out)
        size = programs * tiles.split * (tiles.out + 1) * rows if tiles.split > 1 else 0
        kernels.rows_linear[(programs, tiles.split)](
            x, weight.data, weight.scales, weight.bias, norm, residual, out,
            count, outputs, weight.inputs, self._eps, x.stride(0), out.stride(0),
            SCALED=weight.scales is not None, NORMED=norm is not None, GATED=gated, BIASED=weight.bias is not None,
            ADDED=residual is not None, ROWS=rows, BLOCK_OUT=tiles.out, BLOCK_IN=tiles.inputs, SPLIT=tiles.split,
            partial=self._scratch.floats("linear", size), counters=self._scratch.counters("linear done", programs),
            OVERLAPS=self._overlaps, **_exchanging(exchange),
            launch_pdl=self._overlaps, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return out


def _exchanging(exchange: Exchange | None) -> dict[str, Any]:
    """A launch's arguments."""
    if exchange is None:
        nothing = dict.fromkeys(("factor", "slots", "flags", "step", "slot", "place", "limit"))
        return {**nothing, "RANK": 0, "RANKS": 1, "SLOT": 0}
    of = exchange
    names = {"factor": of.factor, "slots": of.slots, "flags": of.flags, "step": of.step, "slot": of.slot}
    return {**names, "place": of.place, "limit": of.limit, "RANK": of.rank, "RANKS": of.size, "SLOT": of.slot_size}


def _rows(count: int) -> int:
    return 16 if count <= 16 else 32 if count <= 32 else 64
