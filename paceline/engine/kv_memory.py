"""Memory for slabs: address space first, pages when they are written."""

from __future__ import annotations

import mmap
import sys
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


@dataclass(frozen=True, slots=True)
class Slabs:
    """Where entries get their memory. On a CPU a slab spans `max_model_len` tokens; on a GPU the room asked for.

    Nothing here is shared: any thread may ask.
    """

    geometry: KVGeometry
    max_model_len: int

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
        """One that holds nothing yet."""
        ids = np.zeros(room, dtype=np.int32)
        return KVEntry(*self.tensors(room), ids, charged=room, session_id=session_id, window=window)

    def check(self, export: KVExport) -> None:
        """Raise EngineError if keys and values of another geometry or type are in it, or more than a sequence has."""
        ours = replace(self.geometry, device=torch.device("cpu"))
        length = export.keys.shape[2]
        if export.geometry != ours:
            raise EngineError(f"KV import: {export.geometry}, where this model has {ours}")
        if length > self.max_model_len:
            raise EngineError(f"KV import: {length} tokens, where a sequence has at most {self.max_model_len}")

    def filled(self, export: KVExport) -> KVEntry:
        """An idle entry, in no cache yet, with what an export holds (`check`)."""
        length = export.keys.shape[2]
        entry = self.entry(length, export.session_id, export.window)
        copy_tokens(entry.tensors, export.tensors, length)
        entry.running, entry.ids, entry.length = False, export.token_ids.copy(), len(export.token_ids)
        entry.dropped = export.dropped
        return entry


def copy_tokens(to: Sequence[torch.Tensor], of: Sequence[torch.Tensor], length: int) -> None:
    """The first `length` tokens of everything an entry holds, to any device."""
    for target, source in zip(to, of, strict=True):
        target[:, :, :length] = source[:, :, :length]
