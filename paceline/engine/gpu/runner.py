"""Runs steps on a GPU: short ones as CUDA graphs, captured once for each shape, with their draws.

windows ── one copy ──► inputs ──► graph: ids, layers, logits, draws ── one copy ──► tokens
                           ▲                                              │
                           └──────── the next step's, if it is launched ◄─┘
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from paceline.engine.attention import Window
from paceline.engine.gpu import draws, kernels
from paceline.engine.gpu.attention import SHORT
from paceline.engine.gpu.body import Body
from paceline.engine.gpu.inputs import Batch, StepBuffers, drawn_on_device, packed_masks, sampled_rows, words_of
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_blocks import BLOCK, BlockPool
from paceline.engine.kv_entry import KVGeometry
from paceline.engine.kv_memory import KVMemory
from paceline.engine.runner import Launched, Runner
from paceline.speculation.sampling import Rows

logger = logging.getLogger(__name__)

WINDOWS = (1, 2, 4, 8, SHORT)
"""Longest windows that graphs are captured for."""
MOST_GRAPH_ROWS = 256
"""Rows of the largest graph: beyond, a step takes longer than its launches."""
MOST_SEQUENCES = 256
"""Windows of one pass; more are several passes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A graph's: so many windows, rows in all, and rows of a window, at most."""

    sequences: int
    rows: int
    longest: int

    @classmethod
    def of(cls, windows: Sequence[Window], sequences: int) -> Shape | None:
        """The least that holds these windows, of at most `sequences`; None if there is none."""
        longest = max(len(window.token_ids) for window in windows)
        rows = sum(len(window.token_ids) for window in windows)
        if longest > SHORT or rows > MOST_GRAPH_ROWS:
            return None
        fitting = min(_rounded(len(windows)), sequences)
        return cls(fitting, max(_rounded(rows), fitting), WINDOWS[bisect_left(WINDOWS, longest)])


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: Any
    logits: torch.Tensor


class DeviceLaunch(Launched):
    """A step the device has not finished, perhaps: `logits` and `tokens` are of all its rows, in host memory when
    `event` has happened."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, event: Any, sampled: list[int]) -> None:
        self._logits, self._tokens, self._event, self._sampled = logits, tokens, event, sampled

    @property
    def logits(self) -> torch.Tensor:
        return self._logits if len(self._sampled) == len(self._logits) else self._logits[self._sampled]

    def tokens(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._tokens.tolist()
        return [found[row] for row in self._sampled]


class DeviceRunner(Runner):
    """Runs a body over keys and values in the blocks of a pool.

    `block` tokens make a block of the pools made here; with `graphs` short steps are captured, of which up to
    `max_sequences` windows are expected. A pass may have `max_rows` rows.
    """

    def __init__(
        self,
        body: Body,
        *,
        key_shift: KeyShift | str,
        geometry: KVGeometry,
        max_rows: int,
        max_sequences: int,
        block: int = BLOCK,
        graphs: bool = True,
    ) -> None:
        self.body, self._shape, self._geometry = body, body.shape, geometry
        self._key_shift, self._block, self._graphs = key_shift, block, graphs and geometry.device.type == "cuda"
        self._sequences, self._expected = MOST_SEQUENCES, min(max_sequences, MOST_SEQUENCES)
        rows = max(max_rows, MOST_GRAPH_ROWS)
        columns = -(-self.max_model_len // min(block, BLOCK))
        self._buffers = StepBuffers(rows, MOST_SEQUENCES, columns, geometry.device)
        self._captured: dict[tuple[int, int, Shape], _Graph] = {}
        self._memory: Any = None
        self._names: torch.Tensor | None = None
        self._host_names: np.ndarray | None = None
        chunks = -(-self.vocab_size // draws.CHUNK)
        device = geometry.device
        self._logits: torch.Tensor | None = None
        if self._graphs:
            place = body.place_for_logits(MOST_GRAPH_ROWS)
            self._logits = torch.empty((MOST_GRAPH_ROWS, self.vocab_size), device=device) if place is None else place
        self._tokens = torch.zeros(MOST_GRAPH_ROWS, dtype=torch.long, device=device)
        self._best = torch.empty((MOST_GRAPH_ROWS, chunks), device=device)
        self._masks = torch.zeros((MOST_GRAPH_ROWS, words_of(self.vocab_size)), dtype=torch.int32, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int32, device=device)
        self._drawn: list[int] = []
        """The rows that drew, of the step launched last."""

    @property
    def vocab_size(self) -> int:
        return self._shape.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._shape.max_model_len

    @property
    def device(self) -> torch.device:
        return self._geometry.device

    @property
    def launches(self) -> bool:
        return True

    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def key_shift(self) -> KeyShift | str:
        return self._key_shift

    def kv_memory(self, geometry: KVGeometry, capacity: int, max_model_len: int) -> KVMemory:
        longest = -(-max_model_len // BLOCK) * BLOCK
        return BlockPool.with_room(geometry, capacity, min(self._block, longest))

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        if len(windows) > self._sequences:
            halves = windows[: self._sequences], windows[self._sequences :]
            return torch.cat([self.run(half).clone() for half in halves])
        shape = Shape.of(windows, self._sequences) if self._graphs else None
        if shape is None:
            self._buffers.load(windows)
            return self.body.logits(self._batch(windows, self._sampled(windows)))
        self._buffers.load(windows, (), None, shape.rows, shape.sequences)
        logits = self._replay(shape, windows)
        sampled = self._sampled(windows)
        return logits[: sum(len(window.token_ids) for window in windows)] if sampled is None else logits[sampled]

    @torch.inference_mode()
    def launch(
        self, windows: Sequence[Window], rows: Sequence[Rows], feeds: Sequence[int] | None = None
    ) -> Launched | None:
        shape = Shape.of(windows, self._sequences)
        if len(windows) > self._sequences or shape is None or not drawn_on_device(rows):
            return None
        if feeds is not None and any(each.matcher for each in rows):
            return None  # a mask depends on the token that nobody has seen
        # Windows that are fed have one row each, so the n-th is row n.
        fed = None if feeds is None else {row: self._drawn[feed] for row, feed in enumerate(feeds)}
        self._buffers.load(windows, rows, fed, shape.rows, shape.sequences)
        self._mask(windows, rows)
        count = sum(len(window.token_ids) for window in windows)
        if self._graphs:
            logits = self._replay(shape, windows)[:count]
        else:
            batch = self._batch(windows, None)
            logits = self._step(replace(batch, ids=self._ids[:count]))
        self._drawn = sampled_rows(windows)
        return DeviceLaunch(logits, *self._reading(count), self._drawn)

    def _mask(self, windows: Sequence[Window], rows: Sequence[Rows]) -> None:
        """Bring masks to the device, of the rows that have one."""
        bound, masks = packed_masks(rows, self._host_names, self.vocab_size)
        if bound:
            sampled = sampled_rows(windows)
            where = torch.tensor([sampled[row] for row in bound], device=self.device)
            self._masks[where] = torch.from_numpy(masks).to(self.device)

    def _reading(self, count: int) -> tuple[torch.Tensor, Any]:
        """The first tokens, on their way to host memory, and what happens when they are there."""
        # Each launch has its own: any number may be under way before the first is read.
        on_gpu = self.device.type == "cuda"
        host = torch.empty(count, dtype=torch.long, pin_memory=on_gpu)
        host.copy_(self._tokens[:count], non_blocking=True)
        if not on_gpu:
            return host, None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return host, event

    def close(self) -> None:
        """Without its graphs: NCCL waits for those that hold its calls before it ends."""
        self._captured.clear()
        if self._graphs:
            torch.cuda.synchronize()

    def name_columns(self, names: torch.Tensor) -> None:
        """Draw with the noise of these tokens, int64 [vocab], in place of 0, 1, …: before anything is launched."""
        self._names = names.to(self.device, torch.int32)
        self._host_names = names.cpu().numpy()

    def warm_up(self, memory: KVMemory) -> int:
        """Capture what decoding needs, and windows of one sequence. Returns how many graphs there are."""
        assert isinstance(memory, BlockPool)
        if not self._graphs:
            return 0
        counts = sorted({_rounded(n) for n in range(1, self._expected + 1)})
        decodes = [Shape(n, n, 1) for n in counts]
        verifications = [Shape(1, longest, longest) for longest in WINDOWS[1:]]
        for shape in (*decodes, *verifications):
            self._buffers.load((), (), None, shape.rows, shape.sequences)
            self._graph(shape, memory.keys, memory.values, memory.block)
        torch.cuda.synchronize()
        return len(self._captured)

    def _replay(self, shape: Shape, windows: Sequence[Window]) -> torch.Tensor:
        entry = windows[0].entry
        keys, values = entry.keys.transpose(1, 2), entry.values.transpose(1, 2)
        found = self._graph(shape, keys, values, entry.block)
        found.graph.replay()
        return found.logits

    def _graph(self, shape: Shape, keys: torch.Tensor, values: torch.Tensor, block: int) -> _Graph:
        place = keys.data_ptr(), keys.shape[1], shape
        if place not in self._captured:
            self._captured[place] = self._capture(shape, keys, values, block)
            logger.debug("captured a graph of %s", shape)
        return self._captured[place]

    def _capture(self, shape: Shape, keys: torch.Tensor, values: torch.Tensor, block: int) -> _Graph:
        """The step once as it is, so that kernels are compiled and libraries ready; then as a graph."""
        assert self._logits is not None
        batch = self._batch_of(shape, keys, values, block)
        logits = self._logits[: shape.rows]
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(batch, logits)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy KV meanwhile: what they do is no part of it.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._step(batch, logits)
        self._memory = graph.pool()
        return _Graph(graph, logits)

    def _step(self, batch: Batch, logits: torch.Tensor | None = None) -> torch.Tensor:
        """What a graph does, in `logits` if they are given: float32 [rows, vocab]."""
        inputs = self._buffers.on_device
        count = batch.rows
        kernels.take_ids[(1,)](
            inputs["ids"], inputs["feeds"], self._tokens, self._ids, count, BLOCK=1 << max(4, (count - 1).bit_length())
        )
        logits = self.body.logits(batch, logits)
        self._draw(logits)
        return logits

    def _draw(self, logits: torch.Tensor) -> None:
        inputs, (count, vocab) = self._buffers.on_device, logits.shape
        chunks = self._best.shape[1]
        named, names = self._names is not None, self._names
        draws.draw_chunks[(chunks, count)](
            logits, logits.stride(0), vocab, self._masks, self._masks.stride(0), inputs["masked"], names,
            inputs["counters"], inputs["temperatures"], self._best,
            NAMED=named, CHUNK=draws.CHUNK, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        draws.draw_rows[(count,)](
            logits, logits.stride(0), vocab, self._masks, self._masks.stride(0), inputs["masked"], names,
            inputs["counters"], inputs["temperatures"],
            inputs["log_min_ps"], inputs["top_ps"], inputs["top_ks"], self._best, chunks, self._tokens,
            NAMED=named, CHUNKS=1 << (chunks - 1).bit_length(), CHUNK=draws.CHUNK, BLOCK=1024, num_warps=8,
        )  # fmt: skip

    def _batch_of(self, shape: Shape, keys: torch.Tensor, values: torch.Tensor, block: int) -> Batch:
        """For a graph: nothing in it is known but the shape."""
        batch = self._inputs(shape.rows, shape.sequences, shape.longest, keys, values, block)
        return replace(batch, ids=self._ids[: shape.rows])

    def _batch(self, windows: Sequence[Window], sampled: torch.Tensor | None) -> Batch:
        """For a step that runs as it is."""
        entry, rows = windows[0].entry, [len(window.token_ids) for window in windows]
        pool = entry.keys.transpose(1, 2), entry.values.transpose(1, 2)
        batch = self._inputs(sum(rows), len(windows), max(rows), *pool, entry.block)
        return replace(batch, sampled=sampled, windows=windows)

    def _inputs(
        self, rows: int, sequences: int, longest: int, keys: torch.Tensor, values: torch.Tensor, block: int
    ) -> Batch:
        inputs = self._buffers.on_device
        return Batch(
            **{name: inputs[name][:rows] for name in ("ids", "positions", "slots")},
            **{name: inputs[name][:sequences] for name in ("first_rows", "lengths", "starts", "ends", "tables")},
            bounds=inputs["bounds"][: sequences + 1],
            block=block,
            longest=longest,
            keys=keys,
            values=values,
            sampled=None,
            windows=None,
        )

    def _sampled(self, windows: Sequence[Window]) -> torch.Tensor | None:
        """None if logits of all rows are wanted."""
        if all(window.sample == len(window.token_ids) for window in windows):
            return None
        return torch.tensor(sampled_rows(windows), dtype=torch.long, device=self.device)


def _rounded(n: int) -> int:
    """Up to a power of two, beyond 16 to a multiple of 16, beyond 64 of 64."""
    if n <= 16:
        return 1 << (n - 1).bit_length()
    return -(-n // 16) * 16 if n <= 64 else -(-n // 64) * 64
