"""Memory for slabs: address space first, pages when they are written."""

from __future__ import annotations

import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from paceline.engine.kv_entry import SCALE_DTYPE, KVEntry, KVExport, KVGeometry
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def lazy_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor whose pages the kernel commits one by one, when they are first written.

    Its own anonymous mapping, kept out of huge pages: one 2 MB page per head and layer would commit a slab
    at its first token. Unmapped when the tensor goes. Mapping and unmapping a slab of 377 MB that holds a short
    request takes 0.3 ms in all, so that slabs are not worth a free list, which would hold on to their pages.
    """
    size = dtype.itemsize * int(np.prod(shape))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVMemory(ABC):
    """Where entries get the memory for their keys and values."""

    geometry: KVGeometry

    @abstractmethod
    def limit(self, tokens: int) -> int:
        """The room of a cache that was asked to have so much in all."""

    @abstractmethod
    def rounded(self, tokens: int) -> int:
        """Room that is given for so many tokens."""

    @abstractmethod
    def entry(self, room: int, session_id: str | None, window: StreamingWindow | None) -> KVEntry:
        """One that holds nothing yet; `room` is rounded."""

    @abstractmethod
    def widen(self, entry: KVEntry, room: int) -> None:
        """Give an entry room for so many tokens, at least; what it holds stays."""

    @abstractmethod
    def trim(self, entry: KVEntry, room: int) -> None:
        """Take back what an entry has beyond that, if that can be."""

    @abstractmethod
    def drop(self, entry: KVEntry) -> None:
        """Take back all of it. Whoever still holds the entry must not hold its memory."""

    def fork(self, source: KVEntry, entry: KVEntry, held: int) -> None:
        """Copy the first `held` tokens that one entry holds into another."""
        entry.put(0, source.taken(slice(0, held)))

    def taken_in(self, entry: KVEntry) -> KVEntry:
        """An entry that `Slabs.filled` made, in memory of this kind."""
        own = self.entry(self.rounded(entry.held), entry.session_id, entry.window)
        own.put(0, entry.taken(slice(0, entry.held)))
        own.running, own.ids, own.length, own.dropped = False, entry.ids, entry.length, entry.dropped
        return own

    @abstractmethod
    def check(self, entries: Sequence[KVEntry]) -> None:
        """Raise EngineError unless these are all the entries that have memory, each as much as it is charged."""


@dataclass(frozen=True, slots=True)
class Slabs(KVMemory):
    """Contiguous memory of each entry's own. On a CPU a slab spans `max_model_len` tokens; on a GPU the room asked for.

    Nothing here is shared: any thread may ask.
    """

    geometry: KVGeometry
    max_model_len: int

    def limit(self, tokens: int) -> int:
        return tokens

    def rounded(self, tokens: int) -> int:
        return tokens

    def tensors(self, room: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys, values and scales of a new entry."""
        g = self.geometry
        on_cpu = g.device.type == "cpu"
        room = self.max_model_len if on_cpu else room
        empty = lazy_empty if on_cpu else partial(torch.empty, device=g.device)
        both = empty((2, g.num_layers, g.num_kv_heads, room, g.head_dim), dtype=g.dtype)
        if not g.is_quantized:
            return both[0], both[1], None
        # The heads of a token side by side: few pages for a short sequence.
        scales = empty((2, g.num_layers, room, g.num_kv_heads), dtype=SCALE_DTYPE).transpose(2, 3)
        return both[0], both[1], (scales[0], scales[1])

    def entry(self, room: int, session_id: str | None, window: StreamingWindow | None) -> KVEntry:
        ids = np.zeros(room, dtype=np.int32)
        return KVEntry(*self.tensors(room), ids, charged=room, session_id=session_id, window=window)

    def widen(self, entry: KVEntry, room: int) -> None:
        if room <= entry.room:
            return
        held = entry.taken(slice(0, entry.held))
        entry.keys, entry.values, entry.scales = self.tensors(room)
        entry.put(0, held)

    def trim(self, entry: KVEntry, room: int) -> None:
        """A slab's pages beyond `room` were never written, or stay until it goes."""

    def drop(self, entry: KVEntry) -> None:
        entry.keys = entry.values = entry.keys.new_empty(0)
        entry.scales = None

    def taken_in(self, entry: KVEntry) -> KVEntry:
        return entry

    def check(self, entries: Sequence[KVEntry]) -> None:
        """Each has its own; `KVEntry.check` looks at it."""

    def refuse_other(self, export: KVExport) -> None:
        """Raise EngineError if keys and values of another geometry or type are in it, or more than a sequence has."""
        ours = replace(self.geometry, device=torch.device("cpu"))
        length = export.keys.shape[2]
        if export.geometry != ours:
            raise EngineError(f"KV import: {export.geometry}, where this model has {ours}")
        if length > self.max_model_len:
            raise EngineError(f"KV import: {length} tokens, where a sequence has at most {self.max_model_len}")

    def filled(self, export: KVExport) -> KVEntry:
        """An idle entry, in no cache yet, with what an export holds (`refuse_other`)."""
        length = export.keys.shape[2]
        entry = self.entry(length, export.session_id, export.window)
        entry.put(0, export.tensors)
        entry.running, entry.ids, entry.length = False, export.token_ids.copy(), len(export.token_ids)
        entry.dropped = export.dropped
        return entry
