"""A model on several ranks as the engine sees it: one Runner, over whole keys and values."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.engine.attention import Window
from paceline.engine.gpu.inputs import drawn_on_device
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_entry import SCALE_DTYPE, KVEntry, KVGeometry
from paceline.engine.kv_memory import KVMemory
from paceline.engine.runner import Launched, Runner
from paceline.engine.tp.leader import Leader
from paceline.engine.tp.plan import Op, SharedEntry, draws_said, number_of, windows_said
from paceline.engine.tp.share import Share
from paceline.sessions.window import StreamingWindow
from paceline.speculation.sampling import Rows


class ShardedRunner(Runner):
    """Runs every step on all ranks.

    `share` is rank 0's; `heads` are every rank's of all the model's KV heads, `share_bytes` what each has on its GPU.
    """

    def __init__(self, leader: Leader, share: Share, heads: Sequence[range], share_bytes: Sequence[int] = ()) -> None:
        leader.lead(share, heads)
        self.share_bytes = tuple(share_bytes)
        self.leader, self._own = leader, share.runner
        own = share.runner.kv_geometry()
        # What is put together lies in host memory.
        self._geometry = replace(own, num_kv_heads=max(each.stop for each in heads), device=torch.device("cpu"))
        shift = share.key_shift
        self._key_shift = shift if isinstance(shift, str) else SharedKeyShift(shift.rotations, leader)
        self._memories = itertools.count(1)
        weakref.finalize(self, leader.close)

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._own.max_model_len

    @property
    def device(self) -> torch.device:
        return self._own.device

    @property
    def launches(self) -> bool:
        return self._own.launches

    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def key_shift(self) -> KeyShift | str:
        return self._key_shift

    def kv_memory(self, geometry: KVGeometry, capacity: int, max_model_len: int) -> KVMemory:
        number = next(self._memories)
        self.leader.do(Op.OPEN, number, capacity, max_model_len, geometry.is_quantized)
        return SharedMemory(self.leader, number, geometry)

    def warm_up(self, memory: KVMemory) -> int:
        assert isinstance(memory, SharedMemory)
        found = self.leader.do(Op.WARM_UP, memory.number)
        assert isinstance(found, int)
        return found

    def name_columns(self, names: torch.Tensor) -> None:
        self.leader.tell(Op.COLUMNS, tuple(names.tolist()))

    def close(self) -> None:
        self.leader.close()

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        logits = self.leader.do(Op.RUN, windows_said(windows))
        assert isinstance(logits, torch.Tensor)
        return logits

    def launch(
        self, windows: Sequence[Window], rows: Sequence[Rows], feeds: Sequence[int] | None = None
    ) -> Launched | None:
        if not self.launches or not drawn_on_device(rows) or any(each.matcher for each in rows):
            return None  # grammars are rank 0's, which draws by itself then
        fed = None if feeds is None else tuple(feeds)
        launched = self.leader.do(Op.LAUNCH, windows_said(windows), draws_said(rows), fed)
        assert launched is None or isinstance(launched, Launched)
        return launched


class SharedMemory(KVMemory):
    """Memory for a cache's entries on every rank, each with its share of the heads. It lives as long as they do."""

    def __init__(self, leader: Leader, number: int, geometry: KVGeometry) -> None:
        """`number` is that of the memory that was opened; `geometry` is the whole model's."""
        self.geometry, self.number = geometry, number
        self._leader, self._own = leader, leader.memory(number)
        self._entries = itertools.count(number << 40)
        weakref.finalize(self, leader.tell, Op.CLOSE, number)

    def limit(self, tokens: int) -> int:
        return self._own.limit(tokens)

    def rounded(self, tokens: int) -> int:
        return self._own.rounded(tokens)

    def entry(self, room: int, session_id: str | None, window: StreamingWindow | None) -> KVEntry:
        keys, scales = self._outline(room)
        number = next(self._entries)
        self._leader.tell(Op.ENTER, self.number, number, room)
        ids = np.zeros(room, dtype=np.int32)
        return SharedEntry(keys, keys, scales, ids, room, session_id, window=window, number=number, parts=self)

    def widen(self, entry: KVEntry, room: int) -> None:
        if room > entry.room:
            self._leader.tell(Op.WIDEN, number_of(entry), room, entry.held)
            self._resize(entry, room)

    def trim(self, entry: KVEntry, room: int) -> None:
        if room < entry.room:
            self._leader.tell(Op.TRIM, number_of(entry), room)
            self._resize(entry, room)

    def drop(self, entry: KVEntry) -> None:
        self._leader.tell(Op.DROP, number_of(entry))
        self._resize(entry, 0)

    def fork(self, source: KVEntry, entry: KVEntry, held: int) -> None:
        self._leader.tell(Op.FORK, number_of(source), number_of(entry), held)

    def check(self, entries: Sequence[KVEntry]) -> None:
        self._leader.check(self.number, {number_of(entry): entry.charged for entry in entries})

    def gather(self, number: int, rows: slice) -> tuple[torch.Tensor, ...]:
        return self._leader.gather(number, rows)

    def scatter(self, number: int, start: int, tensors: Sequence[torch.Tensor]) -> None:
        self._leader.scatter(number, start, tensors)

    def fill(self, number: int, tokens: int) -> None:
        self._leader.tell(Op.FILL, number, tokens)

    def _resize(self, entry: KVEntry, room: int) -> None:
        entry.keys, entry.scales = self._outline(room)
        entry.values = entry.keys

    def _outline(self, room: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Of keys or values, and of scales: shapes without memory."""
        g = self.geometry
        keys = torch.empty(1, dtype=g.dtype).expand(g.num_layers, g.num_kv_heads, room, g.head_dim)
        if not g.is_quantized:
            return keys, None
        scales = torch.empty(1, dtype=SCALE_DTYPE).expand(g.num_layers, g.num_kv_heads, room)
        return keys, (scales, scales)


@dataclass(frozen=True, eq=False, slots=True)
class SharedKeyShift(KeyShift):
    """Moves each rank's share of the keys."""

    leader: Leader

    def move(self, entry: KVEntry, first: int, end: int, by: int) -> None:
        self.leader.tell(Op.MOVE, number_of(entry), first, end, by)
