"""What a step needs to know, in memory whose addresses never change: written by the host in one copy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paceline.engine.attention import Window
from paceline.seeds import MASK
from paceline.speculation import coupling, sampling
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams

IN_FLIGHT = 3
"""Host copies of a step's inputs: one is filled while others are being read."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The windows of one step, or of a graph: all shapes may be larger than what is in them.

    `ids` int32 and `slots` int64 are [rows], of which the windows have `lengths` from `first_rows` on, at positions
    `starts` and up to `ends`; int32 [sequences], 0 long where there is none; `bounds` int32 [sequences + 1] says the
    same of the rows. `tables` int32 [sequences, columns] are their blocks of `block` tokens. No window has more than
    `longest` rows. `keys` and `values` are the pool's, [layers, slots, kv_heads, head_dim]. Logits are wanted of the
    rows `sampled`, int64, None: of all. `windows` are None where what is computed must not depend on them: in a graph.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    first_rows: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    bounds: torch.Tensor
    tables: torch.Tensor
    block: int
    longest: int
    keys: torch.Tensor
    values: torch.Tensor
    sampled: torch.Tensor | None
    windows: Sequence[Window] | None

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def sequences(self) -> int:
        return self.lengths.shape[0]

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the windows' keys and values, each [rows, kv_heads, dim], where they belong."""
        self.keys[layer].index_copy_(0, self.slots, k)
        self.values[layer].index_copy_(0, self.slots, v)


class StepBuffers:
    """Inputs of any step of at most `rows` rows of `sequences` windows whose tables have `columns` blocks."""

    def __init__(self, rows: int, sequences: int, columns: int, device: torch.device) -> None:
        by_row, by_sequence = (rows,), (sequences,)
        self._shapes = {
            "slots": (np.int64, by_row),
            "counters": (np.int64, by_row),
            "top_ps": (np.float64, by_row),
            "ids": (np.int32, by_row),
            "feeds": (np.int32, by_row),
            "positions": (np.int32, by_row),
            "temperatures": (np.float32, by_row),
            "log_min_ps": (np.float32, by_row),
            "top_ks": (np.int32, by_row),
            "masked": (np.int32, by_row),
            "first_rows": (np.int32, by_sequence),
            "lengths": (np.int32, by_sequence),
            "starts": (np.int32, by_sequence),
            "ends": (np.int32, by_sequence),
            "bounds": (np.int32, (sequences + 1,)),
            "tables": (np.int32, (sequences, columns)),
        }
        self.rows, self.sequences, self.columns = rows, sequences, columns
        size = sum(_padded(np.dtype(kind).itemsize * int(np.prod(shape))) for kind, shape in self._shapes.values())
        on_gpu = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(IN_FLIGHT)]
        self._events: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(IN_FLIGHT)]  # type: ignore[no-untyped-call]
        self._views = [self._cut(host) for host in self._hosts]
        self._numbers = [{name: view.numpy() for name, view in views.items()} for views in self._views]
        self._tables_at = size - _padded(4 * sequences * columns)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = self._cut(self._device)
        """By name; see `Batch`. `feeds` int32 [rows] say which of the last step's tokens a row's id is, -1: `ids`."""
        self._turn = 0
        self._columns = _Columns.of([])

    def _cut(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        found, start = {}, 0
        for name, (kind, shape) in self._shapes.items():
            size = np.dtype(kind).itemsize * int(np.prod(shape))
            dtype = torch.from_numpy(np.zeros(0, kind)).dtype
            found[name] = memory[start : start + size].view(dtype).view(shape)
            start += _padded(size)
        return found

    def load(
        self,
        windows: Sequence[Window],
        draws: Sequence[Rows] = (),
        feeds: Mapping[int, int] | None = None,
        rows: int | None = None,
        sequences: int | None = None,
    ) -> None:
        """Bring a step to the device: windows, how their sampled rows draw, and which rows begin with the token that
        a row of the step before drew, not with their window's own.

        What lies beyond, up to `rows` rows and `sequences` windows, is empty.
        """
        turn, self._turn = self._turn, (self._turn + 1) % IN_FLIGHT
        if (event := self._events[turn]) is not None:
            event.synchronize()
        host = self._numbers[turn]
        self._write_windows(host, windows)
        count = sum(len(window.token_ids) for window in windows)
        host["feeds"][:count] = -1
        host["temperatures"][:count] = host["masked"][:count] = 0
        for row, feed in (feeds or {}).items():
            host["feeds"][row] = feed
        if draws:
            params, positions = sampling.by_row(draws)
            if params != self._columns.params:
                self._columns = _Columns.of(params)
            sampled = sampled_rows(windows)
            self._columns.write(host, sampled, positions)
            host["masked"][sampled] = [each.matcher is not None for each in draws for _ in range(each.count)]
        beyond, idle = slice(count, rows), slice(len(windows), sequences)
        for name in ("ids", "positions", "slots", "temperatures", "masked"):
            host[name][beyond] = 0
        host["feeds"][beyond] = -1
        host["lengths"][idle] = host["ends"][idle] = 0
        host["bounds"][len(windows) : None if sequences is None else sequences + 1] = count
        # Tables come last: of those nobody reads nothing is copied.
        size = self._tables_at + (sequences or len(windows)) * self.columns * 4
        self._device[:size].copy_(self._hosts[turn][:size], non_blocking=True)
        if event is not None:
            event.record()

    def _write_windows(self, host: dict[str, np.ndarray], windows: Sequence[Window]) -> None:
        """All at once where that can be: with many windows this is what the host does most in a step."""
        n = len(windows)
        if not n:
            return
        ids = list(itertools.chain.from_iterable(window.token_ids for window in windows))
        lengths = np.array([len(window.token_ids) for window in windows], dtype=np.int32)
        starts = np.array([window.start for window in windows], dtype=np.int32)
        first_rows = np.cumsum(lengths) - lengths
        numbers = np.repeat(np.arange(n), lengths)
        positions = np.arange(len(ids)) + (starts - first_rows)[numbers]
        tables, block = host["tables"], windows[0].entry.block
        for table, window in zip(tables, windows, strict=False):
            blocks = window.entry.blocks
            table[: len(blocks)] = blocks
        host["ids"][: len(ids)], host["positions"][: len(ids)] = ids, positions
        host["slots"][: len(ids)] = tables[numbers, positions // block].astype(np.int64) * block + positions % block
        host["first_rows"][:n] = host["bounds"][:n] = first_rows
        host["lengths"][:n], host["starts"][:n], host["ends"][:n] = lengths, starts, starts + lengths


def drawn_on_device(draws: Sequence[Rows]) -> bool:
    """Whether the device draws rows like these: without their history but for a grammar's mask, and under no two
    filters that depend on each other."""
    return not any(
        rows.params.adjusts or (rows.params.top_k > 0 and rows.params.top_p < 1 and not rows.params.greedy)
        for rows in draws
    )


def packed_masks(draws: Sequence[Rows], names: np.ndarray | None, vocab: int) -> tuple[list[int], np.ndarray]:
    """Of rows that draw within grammars, which of all the rows they are, and the tokens they may draw: int32
    [rows, words], a bit for each of `vocab` columns. `names` are the tokens of the columns, None for 0, 1, …."""
    found: list[int] = []
    masks, start = [], 0
    for rows in draws:
        if rows.matcher is not None:
            width = vocab if names is None else int(names[-1]) + 1
            refused = rows.matcher.refused(rows.following, rows.count, width).numpy()
            masks.append(~(refused if names is None else refused[:, names]))
            found += range(start, start + rows.count)
        start += rows.count
    if not found:
        return [], np.zeros((0, words_of(vocab)), dtype=np.int32)
    bits = np.concatenate(masks)
    padded = np.zeros((len(bits), 32 * words_of(vocab)), dtype=bool)
    padded[:, :vocab] = bits
    return found, np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def words_of(vocab: int) -> int:
    """Of a mask."""
    return -(-vocab // 32)


def sampled_rows(windows: Sequence[Window]) -> list[int]:
    """The rows whose logits are wanted, in order."""
    found: list[int] = []
    end = 0
    for window in windows:
        end += len(window.token_ids)
        found += range(end - window.sample, end)
    return found


@dataclass(frozen=True, slots=True)
class _Columns:
    """How some rows draw, column by column. What a step has of it, the next one mostly has, too."""

    params: list[SamplingParams]
    seeds: np.ndarray
    greedy: np.ndarray
    temperatures: np.ndarray
    top_ps: np.ndarray
    top_ks: np.ndarray
    log_min_ps: np.ndarray

    @classmethod
    def of(cls, params: list[SamplingParams]) -> _Columns:
        greedy = np.array([each.greedy for each in params])
        with np.errstate(divide="ignore"):
            log_min_ps = np.log(np.array([each.min_p for each in params], dtype=np.float32))
        return cls(
            params,
            np.array([0 if each.greedy else (each.seed or 0) & MASK for each in params], dtype=np.uint64),
            greedy,
            np.array([0.0 if each.greedy else each.temperature for each in params], dtype=np.float32),
            np.array([each.top_p for each in params]),
            np.array([max(0, each.top_k) for each in params], dtype=np.int32),
            log_min_ps,
        )

    def write(self, host: dict[str, np.ndarray], rows: list[int], positions: list[int]) -> None:
        starts = coupling.starts(self.seeds, np.array(positions, dtype=np.uint64))
        host["counters"][rows] = np.where(self.greedy, 0, starts).astype(np.uint64).view(np.int64)
        for name in ("temperatures", "top_ps", "top_ks", "log_min_ps"):
            host[name][rows] = getattr(self, name)


def _padded(size: int) -> int:
    return -(-size // 16) * 16
