"""The KV cache: who holds keys and values for which tokens, and how much room is left.

History is truth, KV is a cache: an entry remembers the token ids its keys and values were computed from, so
a prefix is reused only where the ids agree, and anything idle may be dropped at any time.

    reserve ──► running entry ── append / truncate ──► release ──► idle entry ──► reserved again, forked, evicted
"""

from __future__ import annotations

import itertools
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from paceline.errors import EngineError

FORK_MIN_TOKENS = 16
"""A shared prefix shorter than this is recomputed: copying it is not worth an entry's bookkeeping."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one token's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Tokens of room: free + cached + in_use = total."""

    free: int
    cached: int
    in_use: int
    total: int


@dataclass(eq=False, slots=True)
class KVEntry:
    """Keys and values of one token sequence.

    `keys` and `values` are [num_layers, num_kv_heads, room, head_dim]. `length` tokens are valid; their ids
    are `ids[:length]`. `charged` is the room it takes from the cache's account.
    """

    keys: torch.Tensor
    values: torch.Tensor
    ids: np.ndarray
    charged: int
    session_id: str | None
    length: int = 0
    running: bool = True
    last_used: int = 0

    @property
    def token_ids(self) -> np.ndarray:
        return self.ids[: self.length]

    def shared_prefix(self, tokens: np.ndarray) -> int:
        """How many leading ids agree with `tokens`."""
        n = min(self.length, len(tokens))
        differs = np.nonzero(self.ids[:n] != tokens[:n])[0]
        return int(differs[0]) if len(differs) else n


class KVCache(ABC):
    """What the engine and the drafter need of a KV cache, whatever the memory behind it."""

    @abstractmethod
    def reserve(self, tokens: Sequence[int], room: int, session_id: str | None = None) -> KVEntry | None:
        """An entry with room for `room` tokens, holding the longest stored prefix of `tokens[:-1]`.

        The last token is never taken from the cache: its logits are needed. None if running entries leave
        no room; idle ones are evicted for it, least recently used first.
        """

    @abstractmethod
    def extend(self, entry: KVEntry, room: int) -> bool:
        """Give a running entry room for `room` tokens in all. False if there is none."""

    @abstractmethod
    def append(self, entry: KVEntry, tokens: Sequence[int]) -> None:
        """Count `tokens` as computed: their keys and values were written behind the entry's length."""

    @abstractmethod
    def truncate(self, entry: KVEntry, length: int) -> None:
        """Forget everything from position `length` on."""

    @abstractmethod
    def release(self, entry: KVEntry) -> None:
        """The sequence ended; what it computed stays, idle, until it is reused or evicted."""

    @abstractmethod
    def evict(self, tokens: int) -> bool:
        """Drop idle entries until `tokens` are free. False if that cannot be."""

    @abstractmethod
    def drop_session(self, session_id: str) -> bool:
        """Drop the idle entries of a session. True if there was one, idle or running."""

    @abstractmethod
    def sessions(self) -> dict[str, tuple[int, bool]]:
        """Session id to (tokens held, running), over all entries that belong to one."""

    @abstractmethod
    def usage(self) -> KVUsage:
        """The account."""

    @abstractmethod
    def check(self) -> None:
        """Raise EngineError unless the account closes and every entry is sound."""


@dataclass(slots=True)
class SlabKVCache(KVCache):
    """One contiguous slab per entry.

    On a CPU a slab spans `max_model_len` tokens of address space and the kernel commits a page when it is
    first written, so a slab never moves and costs what it holds. On a GPU a slab has the room reserved and
    moves when it is extended.
    """

    geometry: KVGeometry
    capacity: int
    max_model_len: int
    _entries: list[KVEntry] = field(default_factory=list)
    _clock: Callable[[], int] = field(default_factory=lambda: itertools.count(1).__next__)

    def reserve(self, tokens: Sequence[int], room: int, session_id: str | None = None) -> KVEntry | None:
        ids = np.asarray(tokens, dtype=np.int32)
        source, shared = self._best_source(ids[:-1], session_id)
        if source is not None and self._may_take_over(source, shared, session_id):
            return self._take_over(source, shared, room, session_id)
        if not self._make_room(room, keep=source):
            # No room beside the source. An idle one is then worth more continued than kept.
            if source is None or source.running:
                return None
            return self._take_over(source, shared, room, session_id)
        entry = self._new_entry(room, session_id)
        if source is not None:
            self._fork(source, entry, shared)
        return entry

    def extend(self, entry: KVEntry, room: int) -> bool:
        if room <= entry.charged:
            return True
        if room > self.max_model_len or not self._make_room(room - entry.charged, keep=entry):
            return False
        self._widen(entry, room)
        entry.charged = room
        return True

    def append(self, entry: KVEntry, tokens: Sequence[int]) -> None:
        end = entry.length + len(tokens)
        if end > entry.charged:
            raise EngineError(f"KV append past its reservation: {end} > {entry.charged}")
        entry.ids[entry.length : end] = tokens
        entry.length = end

    def truncate(self, entry: KVEntry, length: int) -> None:
        entry.length = min(entry.length, length)

    def release(self, entry: KVEntry) -> None:
        entry.running = False
        entry.charged = entry.length
        entry.last_used = self._clock()
        if entry.length == 0:
            self._drop(entry)

    def evict(self, tokens: int) -> bool:
        return self._make_room(tokens, keep=None)

    def drop_session(self, session_id: str) -> bool:
        held = [entry for entry in self._entries if entry.session_id == session_id]
        for entry in held:
            if not entry.running:
                self._drop(entry)
        return bool(held)

    def sessions(self) -> dict[str, tuple[int, bool]]:
        found: dict[str, tuple[int, bool]] = {}
        for entry in self._entries:
            if entry.session_id is not None:
                length, running = found.get(entry.session_id, (0, False))
                found[entry.session_id] = (max(length, entry.length), running or entry.running)
        return found

    def usage(self) -> KVUsage:
        in_use = sum(entry.charged for entry in self._entries if entry.running)
        cached = sum(entry.charged for entry in self._entries if not entry.running)
        return KVUsage(self.capacity - in_use - cached, cached, in_use, self.capacity)

    def check(self) -> None:
        usage = self.usage()
        if usage.free < 0 or usage.free + usage.cached + usage.in_use != usage.total:
            raise EngineError(f"KV account does not close: {usage}")
        for entry in self._entries:
            if not 0 <= entry.length <= entry.charged <= entry.keys.shape[2]:
                raise EngineError(f"KV entry out of bounds: {entry.length}, {entry.charged}, {entry.keys.shape}")

    def _best_source(self, ids: np.ndarray, session_id: str | None) -> tuple[KVEntry | None, int]:
        """The entry with the longest common prefix; among equals the session's own, then an idle one."""
        best: KVEntry | None = None
        rank = (0, False, False)
        for entry in self._entries:
            shared = entry.shared_prefix(ids)
            own = session_id is not None and entry.session_id == session_id
            if shared >= (1 if own else FORK_MIN_TOKENS) and (shared, own, not entry.running) > rank:
                best, rank = entry, (shared, own, not entry.running)
        return best, rank[0]

    @staticmethod
    def _may_take_over(entry: KVEntry, shared: int, session_id: str | None) -> bool:
        """An idle entry is continued in place if that takes nothing from another session."""
        if entry.running:
            return False
        return entry.session_id in (None, session_id) and (entry.session_id is not None or shared == entry.length)

    def _take_over(self, entry: KVEntry, shared: int, room: int, session_id: str | None) -> KVEntry | None:
        entry.running = True
        self.truncate(entry, shared)
        needed = max(room, shared)
        if not self._make_room(needed - entry.charged, keep=entry):
            entry.running = False
            entry.charged = entry.length
            return None
        self._widen(entry, needed)
        entry.charged = needed
        entry.session_id = session_id
        return entry

    def _make_room(self, tokens: int, keep: KVEntry | None) -> bool:
        """Evict idle entries, oldest first, until `tokens` are free."""
        missing = tokens - self.usage().free
        idle = sorted((e for e in self._entries if not e.running and e is not keep), key=lambda e: e.last_used)
        if missing > sum(entry.charged for entry in idle):
            return False
        for entry in idle:
            if missing <= 0:
                break
            missing -= entry.charged
            self._drop(entry)
        return True

    def _new_entry(self, room: int, session_id: str | None) -> KVEntry:
        keys, values = self._allocate(room)
        ids = np.zeros(self.max_model_len, dtype=np.int32)
        entry = KVEntry(keys, values, ids, charged=room, session_id=session_id)
        self._entries.append(entry)
        return entry

    def _fork(self, source: KVEntry, entry: KVEntry, length: int) -> None:
        """Copy the first `length` tokens."""
        entry.keys[:, :, :length] = source.keys[:, :, :length]
        entry.values[:, :, :length] = source.values[:, :, :length]
        self.append(entry, source.ids[:length].tolist())

    def _widen(self, entry: KVEntry, room: int) -> None:
        if room <= entry.keys.shape[2]:
            return
        n = entry.length
        keys, values = self._allocate(room)
        keys[:, :, :n] = entry.keys[:, :, :n]
        values[:, :, :n] = entry.values[:, :, :n]
        entry.keys, entry.values = keys, values

    def _allocate(self, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        if g.device.type != "cpu":
            shape = (2, g.num_layers, g.num_kv_heads, room, g.head_dim)
            both = torch.empty(shape, dtype=g.dtype, device=g.device)
        else:
            both = _lazy_empty((2, g.num_layers, g.num_kv_heads, self.max_model_len, g.head_dim), g.dtype)
        return both[0], both[1]

    def _drop(self, entry: KVEntry) -> None:
        self._entries = [other for other in self._entries if other is not entry]


def _lazy_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor whose pages the kernel commits one by one, when they are first written.

    Its own anonymous mapping, kept out of huge pages: one 2 MB page per head and layer would commit a slab
    at its first token. Unmapped when the tensor goes.
    """
    size = dtype.itemsize * int(np.prod(shape))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
