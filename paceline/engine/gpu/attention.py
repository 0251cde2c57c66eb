"""Attention over keys and values in blocks, on a GPU: which kernel, in which shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from paceline.engine.attention import AttentionStep, RaggedBatch, Scoring
from paceline.engine.gpu import kernels, paged_libraries
from paceline.engine.gpu.inputs import Batch

SHORT = 16
"""Tokens of a window up to which our kernel takes it; longer ones, a prompt's, go to FlashAttention."""
MOST_ROWS = 64
"""Of a tile of queries."""
MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Heads:
    """How a layer's queries, keys and values are laid out, and what is done to them before they meet.

    `cos` and `sin` are float32 [positions, dim / 2] if rows are turned here; the norms [dim] if they are normed here.
    """

    heads: int
    kv_heads: int
    dim: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    norm_eps: float = 0.0

    @property
    def group(self) -> int:
        """Query heads that share a key's."""
        return self.heads // self.kv_heads

    @property
    def half(self) -> int:
        return max(16, _power(self.dim // 2))


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a launch of `paged_attention`."""

    rows: int
    row_tiles: int
    split: int
    tile: int
    new: int
    warps: int
    stages: int

    @classmethod
    def of(cls, sequences: int, longest: int, heads: Heads, block: int, processors: int) -> Plan:
        """For so many windows of at most `longest` tokens: enough programs to fill the GPU, whatever the lengths."""
        rows = min(MOST_ROWS, max(16, _power(longest * heads.group)))
        tiles = -(-longest * heads.group // rows)
        programs = sequences * heads.kv_heads * tiles
        wanted = (2 if rows == 16 else 1) * processors
        split = min(MOST_SPLITS, _power(-(-wanted // programs)))
        new = min(64, max(16, _power(longest)))
        warps = 8 if programs * split <= processors else 4
        return cls(rows, tiles, split, min(64, block), new, warps, stages=2)


class Scratch:
    """Memory that launches share: partial sums, and counters that are zero between two launches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._latest: dict[str, torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []

    def floats(self, name: str, size: int) -> torch.Tensor:
        return self._at_least(name, size, torch.float32)

    def counters(self, name: str, size: int) -> torch.Tensor:
        return self._at_least(name, size, torch.int32)

    def _at_least(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        found = self._latest.get(name)
        if found is None or found.numel() < size:
            found = self._latest[name] = torch.zeros(size, dtype=dtype, device=self._device)
            self._kept.append(found)  # graphs hold the addresses of those they were captured with
        return found


class PagedAttention:
    """Attention of a step's windows over keys and values in blocks, by one kernel; stores the windows' own first.

    `q` is [rows, heads, dim], `k` and `v` [rows, kv_heads, dim], the last dimension contiguous.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """`name` as in `engine.attn_implementation`: one that reads blocks."""
        self.name = name
        self._library = None if name == "triton" else paged_libraries.attention(name)
        self._scratch = Scratch(device)
        self._processors = _processors(device)
        self.overlaps = False
        """Whether a launch may begin while the one before ends, which must say so."""

    def turns(self, longest: int) -> bool:
        """Whether rows of windows that long may come as they are, and are normed and turned here (`Heads`)."""
        return self._library is None and longest <= SHORT

    def attend(
        self,
        batch: Batch,
        layer: int,
        heads: Heads,
        scoring: Scoring,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """[rows, heads * dim]. Prompts' windows go one by one to PyTorch's kernels, which need `batch.windows`."""
        if self._library is not None and scoring.sinks is None:
            batch.store(layer, k, v)
            return self._library(batch, layer, scoring, q)
        out = torch.empty((q.shape[0], heads.heads * heads.dim), dtype=q.dtype, device=q.device)
        windows = batch.windows or ()
        long = [window for window in windows if len(window.token_ids) > SHORT]
        if not long:
            self._launch(batch, layer, heads, scoring, q, k, v, out)
            return out
        if len(long) < len(windows):
            lengths = batch.lengths.masked_fill(batch.lengths > SHORT, 0)
            short = replace(batch, longest=SHORT, lengths=lengths)
            self._launch(short, layer, heads, scoring, q, k, v, out)
        row = 0
        for window in windows:
            rows = slice(row, row + len(window.token_ids))
            row = rows.stop
            if len(window.token_ids) > SHORT:
                own_q, own_k, own_v = (each[rows].transpose(0, 1)[None] for each in (q, k, v))
                found = RaggedBatch([window]).attend(layer, own_q, own_k, own_v, scoring)
                out[rows] = found[0].transpose(0, 1).flatten(1)
        return out

    def _launch(
        self,
        batch: Batch,
        layer: int,
        heads: Heads,
        scoring: Scoring,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        slopes: torch.Tensor | None = None,
    ) -> None:
        plan = Plan.of(batch.sequences, batch.longest, heads, batch.block, self._processors)
        places = batch.sequences * heads.kv_heads * plan.row_tiles
        size = places * plan.split * plan.rows if plan.split > 1 else 0
        scratch = self._scratch
        kernels.paged_attention[(plan.split * plan.row_tiles, heads.kv_heads, batch.sequences)](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
            batch.keys[layer], batch.values[layer], batch.keys.stride(1), heads.cos, heads.sin, out, out.stride(0),
            batch.first_rows, batch.lengths, batch.starts, batch.tables, batch.tables.stride(0),
            scratch.floats("partial", size * 2 * heads.half), scratch.floats("sums", size * 2),
            scratch.counters("done", places),
            scoring.scale, scoring.softcap or 0.0, scoring.sliding_window or 0,
            heads.q_norm, heads.k_norm, heads.norm_eps, slopes, scoring.sinks,
            GROUP=heads.group, KV_HEADS=heads.kv_heads, DIM=heads.dim, HALF=heads.half,
            ROWS=plan.rows, ROW_TILES=plan.row_tiles, SPLIT=plan.split, BLOCK=batch.block, TILE=plan.tile, NEW=plan.new,
            ROTATES=heads.cos is not None, NORMED=heads.q_norm is not None, CAPPED=scoring.softcap is not None,
            SLIDING=scoring.sliding_window is not None, SLOPED=slopes is not None, SUNK=scoring.sinks is not None,
            OVERLAPS=self.overlaps, launch_pdl=self.overlaps, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PagedStep(AttentionStep):
    """For models that run their own code: rows come turned to their positions."""

    batch: Batch
    attention: PagedAttention

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        _, heads, _, dim = query.shape
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        found = self.attention.attend(self.batch, layer, Heads(heads, key.shape[1], dim), scoring, q, k, v)
        return found.view(-1, heads, dim).transpose(0, 1)[None]


def launches_overlap(device: torch.device) -> bool:
    """Whether this GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (max(1, n) - 1).bit_length()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
