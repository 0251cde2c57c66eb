"""Keys and values in blocks of one pool: memory that is neither moved nor split by sequences that come, grow and go.

What runs over it knows addresses that never change, the pool's, and looks up in a table which blocks are whose: so a
step can be captured once, as a CUDA graph, and replayed for other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.engine.kv_entry import SCALE_DTYPE, KVEntry, KVGeometry
from paceline.engine.kv_memory import KVMemory
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

BLOCK = 64
"""Tokens of a block: what one tile of our attention kernel reads."""


class BlockPool(KVMemory):
    """All of a cache's room, allocated at once, handed out in blocks of `block` tokens.

    `keys` and `values` are [num_layers, slots, num_kv_heads, head_dim]: the heads of a token side by side, as paged
    attention kernels want them. Only for the thread that owns the cache.
    """

    def __init__(self, geometry: KVGeometry, capacity: int, block: int = BLOCK) -> None:
        """`capacity` in tokens; what is no whole block is not used."""
        self.geometry, self.block = geometry, block
        g, count = geometry, capacity // block
        shape = (2, g.num_layers, count * block, g.num_kv_heads, g.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=g.dtype, device=g.device)
        self.scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if g.is_quantized:
            by_key, by_value = torch.empty(shape[:-1], dtype=SCALE_DTYPE, device=g.device)
            self.scales = by_key, by_value
        self._free = list(range(count - 1, -1, -1))
        self._offsets = torch.arange(block, device=g.device)

    @classmethod
    def with_room(cls, geometry: KVGeometry, tokens: int, block: int = BLOCK) -> BlockPool:
        """Of as many whole blocks as so many tokens begin."""
        return cls(geometry, -(-tokens // block) * block, block)

    @property
    def capacity(self) -> int:
        """Tokens of room, free or not."""
        return int(self.keys.shape[1])

    def limit(self, tokens: int) -> int:  # noqa: ARG002  (it was allocated when it was made)
        return self.capacity

    def rounded(self, tokens: int) -> int:
        return -(-tokens // self.block) * self.block

    def entry(self, room: int, session_id: str | None, window: StreamingWindow | None) -> KVEntry:
        ids = np.zeros(room, dtype=np.int32)
        scales = None if self.scales is None else (self.scales[0].transpose(1, 2), self.scales[1].transpose(1, 2))
        views = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        entry = KVEntry(*views, scales, ids, charged=room, session_id=session_id, window=window)
        self._assign(entry, [])
        self.widen(entry, room)
        return entry

    def widen(self, entry: KVEntry, room: int) -> None:
        missing = -(-room // self.block) - len(entry.blocks)
        if missing <= 0:
            return
        if missing > len(self._free):
            raise EngineError(f"KV pool: {missing} blocks are asked for, {len(self._free)} are free")
        self._assign(entry, entry.blocks + [self._free.pop() for _ in range(missing)])

    def trim(self, entry: KVEntry, room: int) -> None:
        kept = -(-room // self.block)
        self._free += entry.blocks[: kept - 1 : -1] if kept else entry.blocks[::-1]
        self._assign(entry, entry.blocks[:kept])

    def drop(self, entry: KVEntry) -> None:
        self.trim(entry, 0)
        entry.keys = entry.values = entry.keys.new_empty(0)
        entry.scales = None

    def check(self, entries: Sequence[KVEntry]) -> None:
        held = sorted(block for entry in entries for block in entry.blocks)
        if sorted(held + self._free) != list(range(self.capacity // self.block)):
            raise EngineError(f"KV pool: {len(held)} blocks held and {len(self._free)} free, of {self.capacity} tokens")
        if any(len(entry.blocks) * self.block != entry.charged for entry in entries):
            raise EngineError("KV pool: an entry has other room than it is charged")

    def _assign(self, entry: KVEntry, blocks: list[int]) -> None:
        entry.blocks = blocks
        first = torch.tensor(blocks, dtype=torch.long, device=self.geometry.device)[:, None] * self.block
        entry.slots = (first + self._offsets).flatten()
