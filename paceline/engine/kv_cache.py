"""The KV cache: who holds keys and values for which tokens, and how much room is left.

History is truth, KV is a cache: an entry remembers the token ids its keys and values were computed from, so
a prefix is reused only where the ids agree, and anything idle may be dropped at any time.

    reserve ──► running entry ── append / truncate ──► release ──► idle entry ──► reserved again, forked, evicted
                                 └─ shift ─┘           import ──►            ──► exported
                                                       adopt ──►             ──► spilled when evicted

Under a streaming window (`paceline.sessions.window`) an entry holds fewer tokens than it was computed from. Room is
counted in tokens held, prefixes in tokens of the text.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_entry import KVEntry, KVExport, KVGeometry, KVUsage
from paceline.engine.kv_index import CHUNK, PrefixIndex
from paceline.engine.kv_memory import KVMemory, Slabs
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

__all__ = ["FORK_MIN_TOKENS", "KVCache", "KVEntry", "KVExport", "KVGeometry", "KVUsage", "SlabKVCache"]

FORK_MIN_TOKENS = CHUNK
"""A shared prefix shorter than this is recomputed: copying it is not worth an entry's bookkeeping."""


class KVCache(ABC):
    """What the engine and the drafter need of a KV cache, whatever the memory behind it."""

    @property
    @abstractmethod
    def shift_refusal(self) -> str | None:
        """Why no streaming window is possible here, or None."""

    @abstractmethod
    def reserve(
        self,
        tokens: Sequence[int],
        room: int,
        session_id: str | None = None,
        window: StreamingWindow | None = None,
    ) -> KVEntry | None:
        """An entry with room for `room` tokens, holding the longest stored prefix of `tokens[:-1]`.

        Under a `window` the prefix is one that was computed under the same, or that no shift has touched. The last
        token is never taken from the cache: its logits are needed. None if running entries leave
        no room; idle ones are evicted for it: anonymous ones, then sessions, least recently used first.
        """

    @abstractmethod
    def match(self, tokens: Sequence[int], session_id: str | None = None, window: StreamingWindow | None = None) -> int:
        """How many of `tokens[:-1]` `reserve` would find. Changes nothing."""

    @abstractmethod
    def extend(self, entry: KVEntry, room: int) -> bool:
        """Give a running entry room for `room` tokens in all. False if there is none."""

    @abstractmethod
    def append(self, entry: KVEntry, tokens: Sequence[int]) -> None:
        """Count `tokens` as computed: their keys and values were written behind those held."""

    @abstractmethod
    def shift(self, entry: KVEntry) -> None:
        """Call before a token is computed: if the entry's streaming window is full, drop what it drops then."""

    @abstractmethod
    def truncate(self, entry: KVEntry, length: int) -> None:
        """Forget every token from `length` on, and what cannot be kept without them (`KVEntry.keeps`)."""

    @abstractmethod
    def release(self, entry: KVEntry) -> None:
        """The sequence ended; what it computed stays, idle, until it is reused or evicted."""

    @abstractmethod
    def evict(self, tokens: int) -> bool:
        """Drop idle entries until `tokens` are free. False if that cannot be."""

    @abstractmethod
    def export_session(self, session_id: str) -> KVExport | None:
        """A copy of the longest entry of a session, idle or running, as far as it is computed; or None."""

    @abstractmethod
    def import_session(self, export: KVExport) -> bool:
        """Put an export in place of the session's idle entries. False, and nothing changed, if there is no room.

        Raises EngineError if it is of another geometry or type, or longer than any sequence here: what was
        quantized elsewhere is not what would be computed here.
        """

    @abstractmethod
    def adopt(self, entry: KVEntry) -> bool:
        """Take in an idle entry that `Slabs.filled` made, beside what its session has, as far as either is not part of
        the other. False, and nothing changed, if there is no room."""

    @abstractmethod
    def drop_session(self, session_id: str) -> bool:
        """Drop the idle entries of a session. True if there was one, idle or running."""

    @abstractmethod
    def sessions(self) -> dict[str, tuple[int, bool]]:
        """Session id to (tokens held, running), over all entries that belong to one; about in the order of their use,
        the latest last."""

    @abstractmethod
    def session_names(self) -> tuple[set[str], set[str]]:
        """Sessions with a running entry, and all that have any. Any thread may ask."""

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """What the keys and values of one token take."""

    @abstractmethod
    def recent(self, limit: int) -> list[np.ndarray]:
        """Copies of the token ids, int32 [tokens], of the entries that would be evicted last, those first."""

    @abstractmethod
    def usage(self) -> KVUsage:
        """The account. Any thread may ask; another than the owner may see the middle of a change."""

    @abstractmethod
    def check(self) -> None:
        """Raise EngineError unless the account closes and every entry is sound."""


class SlabKVCache(KVCache):
    """One contiguous slab per entry.

    On a CPU a slab spans the longest sequence in address space and the kernel commits a page when it is first
    written, so a slab never moves and costs what it holds. On a GPU a slab has the room reserved and moves when
    it is extended. `shift` is how keys follow a streaming window, or why they cannot. `spill` gets what was evicted of
    sessions.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        capacity: int,
        max_model_len: int,
        shift: KeyShift | str = "this cache was made without",
        spill: Callable[[KVExport], None] | None = None,
        memory: KVMemory | None = None,
    ) -> None:
        self.geometry, self.capacity = geometry, capacity if memory is None else memory.limit(capacity)
        self._key_shift = shift
        self._spill = spill
        self.max_model_len = min(max_model_len, self.capacity)
        self._slabs = Slabs(geometry, self.max_model_len)
        self.memory = self._slabs if memory is None else memory
        self._running: dict[KVEntry, None] = {}
        # Least recently used first. Anonymous entries go before any session's.
        self._anonymous: dict[KVEntry, None] = {}
        self._of_sessions: dict[KVEntry, None] = {}
        self._by_session: dict[str, dict[KVEntry, None]] = {}
        self._index = PrefixIndex()
        self._in_use = self._cached = 0

    @property
    def shift_refusal(self) -> str | None:
        return self._key_shift if isinstance(self._key_shift, str) else None

    def reserve(
        self,
        tokens: Sequence[int],
        room: int,
        session_id: str | None = None,
        window: StreamingWindow | None = None,
    ) -> KVEntry | None:
        if room > self.max_model_len:
            return None
        room = self.memory.rounded(room)
        source, shared = self._best_source(_ids(tokens)[:-1], session_id, window)
        if source is not None and _may_take_over(source, shared, session_id):
            return self._take_over(source, shared, room, session_id, window)
        if not self._make_room(room, keep=source):
            # No room beside the source. An idle one is then worth more continued than kept.
            if source is None or source.running:
                return None
            return self._take_over(source, shared, room, session_id, window)
        entry = self._new_entry(room, session_id, window)
        if source is not None:
            self._fork(source, entry, shared)
        return entry

    def match(self, tokens: Sequence[int], session_id: str | None = None, window: StreamingWindow | None = None) -> int:
        return self._best_source(_ids(tokens)[:-1], session_id, window)[1]

    def extend(self, entry: KVEntry, room: int) -> bool:
        if room <= entry.charged:
            return True
        if room > self.max_model_len:
            return False
        room = self.memory.rounded(room)
        if not self._make_room(room - entry.charged, keep=entry):
            return False
        self.memory.widen(entry, room)
        self._in_use += room - entry.charged
        entry.charged = room
        return True

    def append(self, entry: KVEntry, tokens: Sequence[int]) -> None:
        if len(tokens) > entry.left:
            raise EngineError(f"KV append past its reservation: {len(tokens)} > {entry.left}")
        entry.write_ids(tokens)
        self._index.update(entry)

    def shift(self, entry: KVEntry) -> None:
        window = entry.window
        if window is None or not entry.full:
            return
        if isinstance(self._key_shift, str):
            raise EngineError(f"KV shift: {self._key_shift}")
        self._key_shift.move(entry, window.n_keep + window.n_discard, entry.held, window.n_discard)
        entry.dropped += window.n_discard
        self._index.update(entry, shifted=True)

    def truncate(self, entry: KVEntry, length: int) -> None:
        dropped = entry.dropped
        entry.cut(length)
        self._index.update(entry, shifted=entry.dropped != dropped)

    def release(self, entry: KVEntry) -> None:
        self._set_idle(entry)
        self._drop_redundant(entry)

    def evict(self, tokens: int) -> bool:
        return self._make_room(tokens, keep=None)

    def export_session(self, session_id: str) -> KVExport | None:
        longest = max(self._by_session.get(session_id, ()), key=lambda entry: entry.length, default=None)
        return KVExport.of(longest) if longest is not None and longest.length else None

    def import_session(self, export: KVExport) -> bool:
        self._slabs.refuse_other(export)
        length = export.keys.shape[2]
        replaced = [entry for entry in self._by_session.get(export.session_id, ()) if not entry.running]
        if self.memory.rounded(length) > self.capacity - self._in_use:
            return False
        for entry in replaced:
            self._drop(entry)
        self._make_room(self.memory.rounded(length), keep=None)
        self._take_in(self._slabs.filled(export))
        return True

    def adopt(self, entry: KVEntry) -> bool:
        room = self.memory.rounded(entry.held)
        if room > self.capacity - self._in_use:
            return False
        self._make_room(room, keep=None)
        self._drop_redundant(self._take_in(entry))
        return True

    def drop_session(self, session_id: str) -> bool:
        held = list(self._by_session.get(session_id, ()))
        for entry in held:
            if not entry.running:
                self._drop(entry)
        return bool(held)

    def sessions(self) -> dict[str, tuple[int, bool]]:
        return {
            session_id: (max(entry.held for entry in held), any(entry.running for entry in held))
            for session_id, held in self._by_session.items()
        }

    def session_names(self) -> tuple[set[str], set[str]]:
        running = {entry.session_id for entry in list(self._running)}
        return {name for name in running if name is not None}, set(self._by_session)

    @property
    def bytes_per_token(self) -> int:
        return self.geometry.bytes_per_token

    def recent(self, limit: int) -> list[np.ndarray]:
        latest = itertools.chain(self._running, reversed(self._of_sessions), reversed(self._anonymous))
        return [entry.token_ids.copy() for entry in itertools.islice(latest, limit)]

    def usage(self) -> KVUsage:
        return KVUsage(self.capacity - self._in_use - self._cached, self._cached, self._in_use, self.capacity)

    def check(self) -> None:
        idle = [*self._anonymous, *self._of_sessions]
        counted = (sum(entry.charged for entry in self._running), sum(entry.charged for entry in idle))
        usage = self.usage()
        if usage.free < 0 or counted != (usage.in_use, usage.cached):
            raise EngineError(f"KV account does not close: {usage}, counted {counted}")
        for entry in (*self._running, *idle):
            entry.check()
            if len(entry.chain) != entry.length // CHUNK or entry.running != (entry in self._running):
                raise EngineError(f"KV entry out of place: {entry.length}, {len(entry.chain)}, {entry.running}")
        self.memory.check([*self._running, *idle])
        named = {id(entry) for held in self._by_session.values() for entry in held}
        if named != {id(entry) for entry in (*self._running, *idle) if entry.session_id is not None}:
            raise EngineError("KV entries and sessions disagree")

    def _best_source(
        self, ids: np.ndarray, session_id: str | None, window: StreamingWindow | None
    ) -> tuple[KVEntry | None, int]:
        """The entry with the longest common prefix of use; among equals the session's own, then an idle one."""
        best: KVEntry | None = None
        rank = (0, False, False)
        own = self._by_session.get(session_id, {}) if session_id is not None else {}
        for entry in (*own, *self._index.find(ids, window)):
            shared = entry.serves(entry.shared_prefix(ids), window)
            enough = shared >= (1 if entry in own else FORK_MIN_TOKENS)
            if enough and (shared, entry in own, not entry.running) > rank:
                best, rank = entry, (shared, entry in own, not entry.running)
        return best, rank[0]

    def _take_over(
        self, entry: KVEntry, shared: int, room: int, session_id: str | None, window: StreamingWindow | None
    ) -> KVEntry | None:
        """Continue an idle entry in place, under the new owner. None, and nothing changed, if there is no room."""
        needed = max(room, self.memory.rounded(shared - entry.dropped_at(shared)))
        if not self._make_room(needed - entry.charged, keep=entry):
            return None
        self.truncate(entry, shared)
        self.memory.trim(entry, needed)
        self.memory.widen(entry, needed)
        self._leave(entry)
        entry.running, entry.charged, entry.session_id, entry.window = True, needed, session_id, window
        self._enter(entry)
        return entry

    def _make_room(self, tokens: int, keep: KVEntry | None) -> bool:
        """Evict idle entries until `tokens` are free. False, and nothing evicted, if that is not enough."""
        kept = keep.charged if keep is not None and not keep.running else 0
        missing = tokens - (self.capacity - self._in_use - self._cached)
        if missing > self._cached - kept:
            return False
        victims = []
        for entry in itertools.chain(self._anonymous, self._of_sessions):
            if missing <= 0:
                break
            if entry is not keep:
                missing -= entry.charged
                victims.append(entry)
        for entry in victims:
            self._evict(entry)
        return True

    def _evict(self, entry: KVEntry) -> None:
        if self._spill is not None and entry.session_id is not None and entry.length:
            self._spill(KVExport.moved(entry))
        self._drop(entry)

    def _drop_redundant(self, entry: KVEntry) -> None:
        """Of an idle entry and another that begins with it, one is enough: a session's own, or any for no session's."""
        if not entry.length:
            return self._drop(entry)
        own = self._by_session.get(entry.session_id, {}) if entry.session_id is not None else {}
        window = _shifted_by(entry)
        # A session's own entry may be found by the index as well: once is enough, it can be dropped only once.
        for other in dict.fromkeys((*own, *self._index.find(entry.token_ids, window))):
            if other is entry:
                continue
            shared = other.shared_prefix(entry.token_ids)
            if other.serves(shared, window) == entry.length and entry.session_id in (None, other.session_id):
                self._touch(other)
                return self._drop(entry)
            redundant = entry.serves(shared, _shifted_by(other)) == other.length
            if redundant and not other.running and other.session_id in (None, entry.session_id):
                self._drop(other)
        return None

    def _new_entry(self, room: int, session_id: str | None, window: StreamingWindow | None) -> KVEntry:
        entry = self.memory.entry(room, session_id, window)
        self._enter(entry)
        return entry

    def _take_in(self, entry: KVEntry) -> KVEntry:
        """An idle entry from elsewhere, for which there is room."""
        entry = self.memory.taken_in(entry)
        self._enter(entry)
        self._index.update(entry)
        return entry

    def _fork(self, source: KVEntry, entry: KVEntry, length: int) -> None:
        """Copy the first `length` tokens, as far as they are held."""
        entry.dropped = source.dropped_at(length)
        self.memory.fork(source, entry, length - entry.dropped)
        self.append(entry, source.ids[:length].tolist())
        self._touch(source)

    def _set_idle(self, entry: KVEntry) -> None:
        self._leave(entry)
        entry.running, entry.charged = False, self.memory.rounded(entry.held)
        self.memory.trim(entry, entry.charged)
        self._enter(entry)

    def _touch(self, entry: KVEntry) -> None:
        """Used just now: the last of its kind to be evicted."""
        if not entry.running:
            self._leave(entry)
            self._enter(entry)

    def _drop(self, entry: KVEntry) -> None:
        self._leave(entry)
        self._index.remove(entry)
        self.memory.drop(entry)

    def _kind(self, entry: KVEntry) -> dict[KVEntry, None]:
        if entry.running:
            return self._running
        return self._anonymous if entry.session_id is None else self._of_sessions

    def _enter(self, entry: KVEntry) -> None:
        self._kind(entry)[entry] = None
        self._account(entry, entry.charged)
        if entry.session_id is not None:
            self._by_session.setdefault(entry.session_id, {})[entry] = None

    def _leave(self, entry: KVEntry) -> None:
        del self._kind(entry)[entry]
        self._account(entry, -entry.charged)
        if entry.session_id is not None:
            held = self._by_session[entry.session_id]
            del held[entry]
            if not held:
                del self._by_session[entry.session_id]

    def _account(self, entry: KVEntry, tokens: int) -> None:
        if entry.running:
            self._in_use += tokens
        else:
            self._cached += tokens


def _may_take_over(entry: KVEntry, shared: int, session_id: str | None) -> bool:
    """An idle entry is continued in place if that takes little, and nothing from another session.

    What is cut off keeps its pages while the entry lives, so at most half may be; else the entry is forked.
    """
    held = shared - entry.dropped_at(shared)
    if entry.running:
        return False
    if entry.session_id is None:
        return shared == entry.length
    return entry.session_id == session_id and 2 * held >= entry.held


def _shifted_by(entry: KVEntry) -> StreamingWindow | None:
    """The window its keys and values are bound to; None while nothing is dropped, whatever its window."""
    return entry.window if entry.dropped else None


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)
