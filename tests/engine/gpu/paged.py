"""A step's attention over keys and values in blocks, and what it must give: spelled out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from paceline.engine.attention import Scoring
from paceline.engine.gpu.attention import Heads
from paceline.engine.gpu.inputs import Batch

SPARE = 3
"""Blocks that belong to nobody."""


@dataclass
class Case:
    """Windows, each (tokens before it, its tokens), over blocks in any order. Rows are `turned` to their positions by
    the kernel, and normed before that if `normed`."""

    windows: Sequence[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    block: int = 16
    turned: bool = False
    normed: bool = False
    sliding: int | None = None
    softcap: float | None = None
    sunk: bool = False
    sloped: bool = False
    seed: int = 0
    draws: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.draws = torch.Generator().manual_seed(self.seed)
        counts = [-(-(start + count) // self.block) for start, count in self.windows]
        total = sum(counts) + SPARE
        order = torch.randperm(total, generator=self.draws)
        self.tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for table, blocks in zip(self.tables, order.split([*counts, SPARE]), strict=False):
            table[: len(blocks)] = blocks
        self.keys, self.values = (self._random(2, total * self.block, self.kv_heads, self.dim) for _ in range(2))
        self.q = self._random(self.rows, self.heads, self.dim)
        self.k, self.v = (self._random(self.rows, self.kv_heads, self.dim) for _ in range(2))
        self.norms = [1 + self._random(self.dim) / 8 for _ in range(2)]
        ends = max(start + count for start, count in self.windows)
        angles = torch.arange(ends)[:, None] * 10_000.0 ** (-torch.arange(0, self.dim, 2) / self.dim)
        self.cos, self.sin = angles.cos().to(self.device), angles.sin().to(self.device)
        self.sinks = torch.randn(self.heads, generator=self.draws).to(self.device)
        self.slopes = (2.0 ** (-8 * torch.arange(1, self.heads + 1) / self.heads)).to(self.device)
        self.before = self.keys.clone(), self.values.clone()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draws).to(self.device, self.dtype)

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.windows)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.dim**-0.5, self.sliding, self.softcap, self.sinks if self.sunk else None)

    @property
    def layout(self) -> Heads:
        turns = (self.cos, self.sin) if self.turned else (None, None)
        norms = self.norms if self.normed else [None, None]
        return Heads(self.heads, self.kv_heads, self.dim, *turns, *norms, norm_eps=1e-6)

    def batch(self) -> Batch:
        """As in a graph: nothing in it is known to the host."""
        starts, counts = ([each[n] for each in self.windows] for n in (0, 1))
        bounds = [sum(counts[:n]) for n in range(len(counts) + 1)]
        ints = {
            "positions": [start + n for start, count in self.windows for n in range(count)],
            "first_rows": bounds[:-1],
            "lengths": counts,
            "starts": starts,
            "ends": [start + count for start, count in self.windows],
            "bounds": bounds,
        }
        return Batch(
            ids=torch.zeros(self.rows, dtype=torch.int32, device=self.device),
            slots=torch.cat([self._slots(n)[start:] for n, start in enumerate(starts)]),
            **{name: torch.tensor(each, dtype=torch.int32, device=self.device) for name, each in ints.items()},
            tables=self.tables.to(self.device),
            block=self.block,
            longest=max(counts),
            keys=self.keys,
            values=self.values,
            sampled=None,
            windows=None,
        )

    def _slots(self, number: int) -> torch.Tensor:
        """Where a window's tokens lie, from the first on."""
        positions = torch.arange(sum(self.windows[number]))
        blocks = self.tables[number][positions // self.block].long()
        return (blocks * self.block + positions % self.block).to(self.device)

    def expected(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[rows, heads * dim], and the keys and values of all layers thereafter; float64."""
        keys, values = (each.double() for each in self.before)
        outputs, row = [], 0
        for number, (start, count) in enumerate(self.windows):
            positions = torch.arange(start, start + count, device=self.device)
            rows, slots = slice(row, row + count), self._slots(number)
            q = self._placed(self.q[rows], self.norms[0], positions)
            keys[layer][slots[start:]] = self._placed(self.k[rows], self.norms[1], positions)
            values[layer][slots[start:]] = self.v[rows].double()
            outputs.append(self._attended(q, keys[layer][slots], values[layer][slots], positions))
            row += count
        return torch.cat(outputs), keys, values

    def _placed(self, x: torch.Tensor, norm: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x.double()
        if self.normed:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
        if not self.turned:
            return x
        cos, sin = (each[positions][:, None].double() for each in (self.cos, self.sin))
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def _attended(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        group = self.heads // self.kv_heads
        scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(group, 1)) * self.dim**-0.5
        j = torch.arange(len(keys), device=self.device)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.sloped:
            scores = scores + self.slopes.double()[:, None, None] * (j - positions[:, None])
        seen = j <= positions[:, None]
        if self.sliding is not None:
            seen &= j > positions[:, None] - self.sliding
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sunk:
            sinks = self.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)).flatten(1)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of all together."""
    return float((found.double() - expected).norm() / expected.norm())
