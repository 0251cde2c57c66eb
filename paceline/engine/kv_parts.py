"""A session's KV in pieces: cut for the wire at one replica, put together in another's cache between two steps.

    KVExport ── cut ──► KVPart, KVPart, …  ── wire ──►  KVAssembly.take ──► an idle entry, found as any other

Pieces are bounded in bytes, so that neither a message nor the pause between two steps of the engine that takes them
grows with the session.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from paceline.engine.kv_cache import KVCache
from paceline.engine.kv_entry import KVEntry, KVExport, KVGeometry
from paceline.sessions.window import StreamingWindow, dropped_under


@dataclass(frozen=True, eq=False, slots=True)
class KVPart:
    """Rows `start`, … of what a session holds.

    `token_ids` int32 [tokens] and `window` are those of the whole session, as in KVExport; `data` are its tensors cut
    to these rows, as bytes: NumPy's arrays cross a shared object store without a copy, and lack bfloat16.
    """

    session_id: str
    token_ids: np.ndarray
    window: StreamingWindow | None
    geometry: KVGeometry
    start: int
    rows: int
    data: tuple[np.ndarray, ...]

    @property
    def held(self) -> int:
        """Rows of the whole session."""
        return len(self.token_ids) - self.dropped

    @property
    def dropped(self) -> int:
        return dropped_under(self.window, len(self.token_ids))

    @property
    def last(self) -> bool:
        return self.start + self.rows == self.held

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.data)


def cut(export: KVExport, max_bytes: int) -> Iterator[KVPart]:
    """The parts of an export in order, each of at most `max_bytes` but of at least one row."""
    geometry, held = export.geometry, export.keys.shape[2]
    rows = max(1, max_bytes // geometry.bytes_per_token)
    for start in range(0, held, rows):
        some = min(rows, held - start)
        data = tuple(_as_bytes(each[:, :, start : start + some]) for each in export.tensors)
        yield KVPart(export.session_id, export.token_ids, export.window, geometry, start, some, data)


def name_entries(kv: KVCache, prefix: str, limit: int) -> None:
    """Make sessions of the entries that would be evicted last, at most `limit`, so that they can be exported. For a
    cache that nobody uses any more; what a streaming window shifted stays as it is."""
    for number, tokens in enumerate(kv.recent(limit)):
        # An idle entry that is asked for as it is changes its owner in place.
        entry = kv.reserve([*tokens.tolist(), 0], len(tokens), f"{prefix}-{number}")
        if entry is not None:
            kv.release(entry)


class KVAssembly:
    """Puts parts together in a cache. Only in the thread that owns the cache.

    Room is taken for all of a session with its first part, as for a running sequence: idle entries are evicted for
    it, never running ones. If `anonymous`, what arrives belongs to no session: whoever begins like it finds it.
    """

    def __init__(self, kv: KVCache, *, anonymous: bool = False) -> None:
        self._kv = kv
        self._anonymous = anonymous
        self._begun: dict[str, _Begun] = {}

    def take(self, part: KVPart) -> bool:
        """Write a part; with the last one the session is there. False, and the session is given up, if there is no
        room for it, if a part before was lost, or if it was computed by another model's geometry."""
        if part.start == 0:
            self.give_up(part.session_id)
            self._begin(part)
        begun = self._begun.get(part.session_id)
        if begun is None or begun.rows != part.start:
            self.give_up(part.session_id)
            return False
        begun.write(part)
        if part.last:
            del self._begun[part.session_id]
            begun.entry.dropped = part.dropped
            self._kv.append(begun.entry, part.token_ids.tolist())
            self._kv.release(begun.entry)
        return True

    def give_up(self, session_id: str) -> None:
        """Forget a session that is not whole yet."""
        if (begun := self._begun.pop(session_id, None)) is not None:
            self._kv.release(begun.entry)

    def _begin(self, part: KVPart) -> None:
        # The one token asked for is never taken from the cache: an entry of its own, and empty.
        session = None if self._anonymous else part.session_id
        entry = self._kv.reserve(part.token_ids[:1].tolist(), part.held, session, part.window)
        if entry is None:
            return
        self._begun[part.session_id] = _Begun(entry)
        if KVGeometry.of(entry.keys) != part.geometry:
            self.give_up(part.session_id)


@dataclass(eq=False, slots=True)
class _Begun:
    """A session of which the first `rows` are there."""

    entry: KVEntry
    rows: int = 0

    def write(self, part: KVPart) -> None:
        whole = zip(self.entry.tensors, part.data, strict=True)
        self.entry.put(part.start, [_as_tensor(data, each.dtype) for each, data in whole])
        self.rows = part.start + part.rows


def _as_bytes(rows: torch.Tensor) -> np.ndarray:
    """Any tensor as uint8, its last dimension so many times longer."""
    found: np.ndarray = rows.contiguous().view(torch.uint8).numpy()
    return found


def _as_tensor(data: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        # What lies in a shared object store is read-only; it is only copied from.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype)
