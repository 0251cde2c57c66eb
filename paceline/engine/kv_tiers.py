"""Where KV of idle sessions goes when the KV cache has no room for it: host memory, then disk.

    KV cache ── evicted ──► host memory ── least recently used ──► disk ── least recently used, too old ──► gone
        ◄────────────────── restored ─────────────────────────────◄──┘

The engine's thread puts, finds and fetches. Copies, checksums and files are the work of others: one writes, one reads,
so that a restore waits behind no write, and one looks for files of other processes. A session is kept once, its latest
version; what a file held before that is harmless, since only KV of the very same token ids is used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from paceline.engine.background import BackgroundThread, Worker
from paceline.engine.kv_cache import KVCache
from paceline.engine.kv_entry import KVEntry, KVExport, SessionKV
from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_index import PrefixIndex
from paceline.engine.kv_memory import Slabs
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

logger = logging.getLogger(__name__)

T = TypeVar("T")
Tier = Literal["host", "disk"]

MIN_TOKENS = 64
"""Less is not kept: computing it again takes about a step."""
WRITE_BEHIND_BYTES = 2**30
"""What may wait to be written, or the host tier's budget if that is more; beyond it sessions are dropped."""
SWEEP_S = 60.0


@dataclass(eq=False, slots=True)
class _Kept:
    """The latest version of a session, in host memory if there is an `export`, else in a file.

    `num_bytes` is what it takes there, once packed. `leaving`: its way to the disk is under way, and its memory no
    longer the host tier's.
    """

    outline: KVEntry
    export: KVExport | None
    num_bytes: int
    used: float
    leaving: bool = False

    @property
    def session_id(self) -> str:
        assert self.outline.session_id is not None
        return self.outline.session_id

    @property
    def tier(self) -> Tier:
        return "disk" if self.export is None else "host"


@dataclass(frozen=True, slots=True)
class Restored:
    """A session brought back, in so many seconds. On a CPU `entry` is it, ready for the KV cache."""

    export: KVExport
    entry: KVEntry | None
    tier: Tier
    seconds: float

    @property
    def outline(self) -> KVEntry:
        return KVEntry.outline(self.export.session_id, self.export.token_ids, self.export.window)

    def put_into(self, kv: KVCache) -> bool:
        """False if there is no room."""
        return kv.adopt(self.entry) if self.entry is not None else kv.import_session(self.export)


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds."""

    sessions: int
    tokens: int
    num_bytes: int


class KVTiers:
    """`host_bytes` of memory, then `files` if there are any; `quantized` keeps int8, which rounds what was not.

    Sessions nobody used for `ttl_s` go. `reader` and `writer` are threads of its own unless given.
    """

    def __init__(
        self,
        slabs: Slabs,
        host_bytes: int,
        files: KVFiles | None = None,
        *,
        quantized: bool = False,
        ttl_s: float = float("inf"),
        clock: Callable[[], float] = time.time,
        reader: Worker | None = None,
        writer: Worker | None = None,
    ) -> None:
        self.quantized = quantized and not slabs.geometry.is_quantized
        self.dropped = 0
        """Sessions for which there was no room in any tier."""
        self.broken = 0
        """Sessions whose file was damaged or could not be read."""
        self.puts = 0
        """How often something was added: a search that found nothing before may find something after."""
        per_token = slabs.geometry.quantized() if quantized else slabs.geometry
        self._bytes_per_token = per_token.bytes_per_token
        self._disk_failed = False
        self._slabs, self._files = slabs, files
        self._host_bytes, self._ttl_s, self._clock = host_bytes, ttl_s, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first
        self._index = PrefixIndex()
        self._reader = reader or BackgroundThread("kv-restore")
        # Most of those it looks for are new sessions, which have no file and should not wait for another's restore.
        self._looker = reader or BackgroundThread("kv-look")
        self._writer = writer or BackgroundThread("kv-spill", self.sweep, SWEEP_S)
        self._writer.submit(self.sweep)

    @property
    def has_files(self) -> bool:
        return self._files is not None

    def put(self, export: KVExport) -> None:
        """Keep a session, in place of what is kept of it. Does not wait; the export is ours from now on."""
        if export.keys.shape[2] < MIN_TOKENS:
            return
        outline = KVEntry.outline(export.session_id, export.token_ids, export.window)
        with self._lock:
            before = self._kept.get(export.session_id)
            if before is not None and _same_text(before.outline, outline):
                self._use(before)
                return
            self._forget(export.session_id)
            kept = _Kept(outline, export, outline.held * self._bytes_per_token, self._clock())
            self._remember(kept)
            self._spill()
        self._writer.submit(lambda: self._pack(kept))

    def find(self, ids: np.ndarray, session_id: str | None, window: StreamingWindow | None) -> KVEntry | None:
        """The outline of what serves most of `ids` (int32 [n]); among equals the session's own."""
        with self._lock:
            own = self._kept.get(session_id) if session_id is not None else None
            found = [own.outline] if own is not None else []
            found += self._index.find(ids, window)
            return max(found, key=lambda outline: outline.serves(outline.shared_prefix(ids), window), default=None)

    def fetch(self, session_id: str, wanted: Callable[[KVEntry], bool]) -> Future[Restored | None]:
        """Bring a session back if its outline is `wanted`, asked in another thread. It stays here as well.

        A file of another process is found too. The future holds None if there is nothing to be had.
        """
        reader = self._looker if self.tier_of(session_id) is None else self._reader
        return reader.submit(lambda: self._fetch(session_id, wanted))

    def taken(self, restored: Restored) -> None:
        """The KV cache has it: host memory need not keep it too."""
        with self._lock:
            kept = self._kept.get(restored.export.session_id)
            if kept is not None and kept.tier == "host" and not kept.leaving:
                self._forget(kept.session_id)

    def drop(self, session_id: str) -> bool:
        """Forget a session, its file too. Whether anything was kept, as far as this process knows."""
        with self._lock:
            known = self._forget(session_id)
        if self._files is not None:
            files = self._files
            self._writer.submit(lambda: self._remove(session_id, files))
        return known

    def sessions(self) -> list[SessionKV]:
        """Least recently used first; those in host memory last."""
        with self._lock:
            kept = sorted(self._kept.values(), key=lambda each: each.tier == "host")
            return [SessionKV(each.session_id, each.outline.length, False, each.num_bytes, each.tier) for each in kept]

    def places(self) -> dict[str, Tier]:
        """Of every session the tier it is kept in."""
        with self._lock:
            return {name: kept.tier for name, kept in self._kept.items()}

    def tier_of(self, session_id: str) -> Tier | None:
        with self._lock:
            kept = self._kept.get(session_id)
            return kept.tier if kept is not None else None

    def may_have_file(self, session_id: str) -> bool:
        """Whether a look into the folder may tell more than `find`."""
        return self._files is not None and self.tier_of(session_id) != "host"

    def usage(self) -> dict[Tier, TierUsage]:
        with self._lock:
            kept = list(self._kept.values())
        return {"host": _usage(kept, "host"), "disk": _usage(kept, "disk")}

    def check(self) -> None:
        """Raise EngineError unless the budgets hold."""
        with self._lock:
            staying, leaving = self._staying_bytes(), self._leaving_bytes()
            if staying > self._host_bytes or leaving > self._write_behind:
                raise EngineError(f"KV tiers: {staying} bytes of {self._host_bytes} stay, {leaving} leave")
            if any(name != kept.session_id for name, kept in self._kept.items()):
                raise EngineError("KV tiers: a session under another's name")

    def sweep(self) -> None:
        """Forget what is too old, and bring the account in line with the folder. Waits for the disk."""
        expired = self._clock() - self._ttl_s
        with self._lock:
            for kept in [each for each in self._kept.values() if each.tier == "host" and each.used < expired]:
                self._forget(kept.session_id)
        if self._files is not None:
            try:
                self._note(self._files, self._files.sweep())
            except OSError as error:
                logger.warning("%s: %s", self._files.folder, error)

    def stop(self, timeout_s: float) -> bool:
        """Write what is in host memory to disk, as far as there is time. Whether all of it was."""
        with self._lock:
            if self._files is not None:
                for kept in [each for each in self._kept.values() if each.tier == "host" and not each.leaving]:
                    self._send(kept)
        done = self._writer.stop(timeout_s)
        for each in (self._reader, self._looker):
            each.stop(0.0)
        return done

    @property
    def _write_behind(self) -> int:
        return max(self._host_bytes, WRITE_BEHIND_BYTES)

    def _staying_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept.values() if kept.tier == "host" and not kept.leaving)

    def _leaving_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept.values() if kept.leaving)

    def _remember(self, kept: _Kept) -> None:
        self._kept[kept.session_id] = kept
        self._index.update(kept.outline)
        self.puts += 1

    def _forget(self, session_id: str) -> bool:
        kept = self._kept.pop(session_id, None)
        if kept is not None:
            self._index.remove(kept.outline)
            kept.export = None  # what is still to be done with it is not done
        return kept is not None

    def _use(self, kept: _Kept) -> None:
        kept.used = self._clock()
        self._kept.move_to_end(kept.session_id)

    def _spill(self) -> None:
        """Send the least recently used out of host memory until the others fit."""
        excess = self._staying_bytes() - self._host_bytes
        for kept in [each for each in self._kept.values() if each.tier == "host" and not each.leaving]:
            if excess <= 0:
                return
            excess -= kept.num_bytes
            self._send(kept)

    def _send(self, kept: _Kept) -> None:
        """To the disk, if there is one and not too much waits for it."""
        files = self._files
        if files is not None and self._leaving_bytes() + kept.num_bytes <= self._write_behind:
            kept.leaving = True
            self._writer.submit(lambda: self._write(kept, files))
        else:
            self._lose(kept)

    def _lose(self, kept: _Kept) -> None:
        self.dropped += 1
        self._forget(kept.session_id)

    def _pack(self, kept: _Kept) -> None:
        """Into memory of its own size, where it was a part of a slab."""
        with self._lock:
            export = kept.export
        if export is None or kept.leaving:
            return
        packed = export.packed(quantized=self.quantized)
        with self._lock:
            if kept.export is export:
                kept.export = packed

    def _write(self, kept: _Kept, files: KVFiles) -> None:
        with self._lock:
            export = kept.export
        if export is None:  # closed, or there is a newer one
            return
        written = self._written(export.packed(quantized=self.quantized), files)
        with self._lock:
            if kept.export is None:
                return
            kept.export, kept.leaving = None, False
            if not written:
                self._lose(kept)

    def _written(self, export: KVExport, files: KVFiles) -> bool:
        try:
            written = files.write(export)
        except OSError as error:
            if not self._disk_failed:
                logger.warning("%s takes no more KV: %s; sessions will be computed again", files.folder, error)
            self._disk_failed = True
            return False
        self._disk_failed = False
        return written

    def _remove(self, session_id: str, files: KVFiles) -> None:
        files.remove(session_id)
        with self._lock:
            kept = self._kept.get(session_id)
            if kept is not None and kept.tier == "disk":  # a sweep has seen the file just before
                self._forget(session_id)

    def _note(self, files: KVFiles, sizes: dict[str, int]) -> None:
        """What the folder holds: forget files that are gone, take in those of other processes."""
        with self._lock:
            known = {files.name(session_id): kept for session_id, kept in self._kept.items()}
            for name, kept in known.items():
                if kept.tier == "disk" and name not in sizes:
                    self._forget(kept.session_id)
        for name in sizes.keys() - known.keys():
            outline = self._unbroken(lambda name=name: files.outline(name))  # type: ignore[misc]
            with self._lock:
                if outline is not None and outline.session_id not in self._kept:
                    self._remember(_Kept(outline, None, sizes[name], self._clock()))

    def _fetch(self, session_id: str, wanted: Callable[[KVEntry], bool]) -> Restored | None:
        began = time.perf_counter()
        with self._lock:
            kept = self._kept.get(session_id)
            export = kept.export if kept is not None else None
            if kept is not None:
                self._use(kept)
        tier: Tier = "disk" if export is None else "host"
        if kept is not None and export is not None and not wanted(kept.outline):
            return None
        if export is None and self._files is not None:
            files = self._files
            export = self._unbroken(lambda: files.read(session_id, self._fits(wanted)))
        if export is None:
            self._gone(kept)
            return None
        export = export.restored(self._slabs.geometry.dtype)
        on_cpu = self._slabs.geometry.device.type == "cpu"
        entry = self._slabs.filled(export) if on_cpu else None
        return Restored(export, entry, tier, time.perf_counter() - began)

    def _fits(self, wanted: Callable[[KVEntry], bool]) -> Callable[[KVEntry], bool]:
        return lambda outline: outline.held <= self._slabs.max_model_len and wanted(outline)

    def _unbroken(self, read: Callable[[], T | None]) -> T | None:
        """What was read; None, and a warning, of a file that is damaged or not to be read."""
        try:
            return read()
        except (EngineError, OSError) as error:
            self.broken += 1
            logger.warning("a session's KV on disk is lost and will be computed again: %s", error)
            return None

    def _gone(self, kept: _Kept | None) -> None:
        """Its file was not there, or of no use any more."""
        with self._lock:
            if kept is not None and self._kept.get(kept.session_id) is kept and kept.tier == "disk":
                self._forget(kept.session_id)


def _same_text(a: KVEntry, b: KVEntry) -> bool:
    return a.window == b.window and np.array_equal(a.token_ids, b.token_ids)


def _usage(kept: list[_Kept], tier: Tier) -> TierUsage:
    held = [each for each in kept if each.tier == tier]
    return TierUsage(len(held), sum(each.outline.held for each in held), sum(each.num_bytes for each in held))
