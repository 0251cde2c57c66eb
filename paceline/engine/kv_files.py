"""KV of sessions in a folder: a safetensors file each, found by a hash of the session's id.

Several processes may share a folder. A file appears whole or not at all (it is renamed to its name), any of them may
vanish at any time, and what a file claims is checked before it is used: who computed it, for which token ids, and a
checksum over everything. A file that fails is removed; the history rebuilds what was in it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paceline.engine.kv_entry import KVEntry, KVExport
from paceline.errors import ConfigError, EngineError, InvalidRequest
from paceline.sessions.window import StreamingWindow

FORMAT = "paceline-kv-1"
SUFFIX = ".safetensors"
UNFINISHED_S = 3600.0
"""A temporary file this old was left behind by a process that died."""

_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    num_bytes: int
    used: float


class KVFiles:
    """The files of one model in one folder. Every method may wait for the disk.

    `identity` says what computed the KV, so that nothing else's is taken for it. All files of the folder together take
    at most `budget` bytes; one that nobody used for `ttl_s` goes. Raises ConfigError if the folder cannot be used.
    """

    def __init__(
        self, folder: Path, identity: str, budget: int, ttl_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self.budget = folder, budget
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._ttl_s, self._clock = ttl_s, clock
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self._temporary()
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"sessions.kv_disk_path: {folder} cannot be written ({error.strerror}); name a folder this user may "
                "write to, or null to keep no KV on disk",
                param="sessions.kv_disk_path",
            ) from None

    def name(self, session_id: str) -> str:
        """The name of a session's file: ids are clients' input, and may hold anything."""
        return f"{self._identity[:16]}-{hashlib.sha256(session_id.encode()).hexdigest()[:40]}{SUFFIX}"

    def write(self, export: KVExport) -> bool:
        """Put an export (contiguous) in place of the session's file, unless that goes on from there. False if it is
        larger than the budget.

        Raises OSError if the disk does not take it; then the file is what it was.
        """
        if export.num_bytes > self.budget:
            return False
        if self._has_later_turn(export):
            return True
        if not self._make_room(export.num_bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tensors = _tensors_of(export)
        about = {
            "format": FORMAT,
            "model": self._identity,
            "session": export.session_id,
            "window": json.dumps(astuple(export.window) if export.window is not None else None),
        }
        temporary, place = self._temporary(), self.folder / self.name(export.session_id)
        try:
            save_file(tensors, temporary, about | {"crc32": _checksum(about, tensors)})
            temporary.chmod(0o600)
            temporary.replace(place)
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(str(error)) from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return True

    def read(self, session_id: str, wanted: Callable[[KVEntry], bool]) -> KVExport | None:
        """What is stored of a session; None if nothing is, or if its outline is not `wanted`.

        Raises EngineError, and the file is removed, if it is not what was written; OSError if it cannot be read.
        """
        path = self.folder / self.name(session_id)
        try:
            with safe_open(path, "pt") as file:
                about = self._checked(file.metadata())
                if about["session"] != session_id:
                    raise EngineError("of another session")
                outline = _outline(about, file)
                if not wanted(outline):
                    return None
                names: list[str] = file.keys()
                export = _export(about, {name: file.get_tensor(name) for name in names})
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, EngineError, InvalidRequest, LookupError, ValueError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise EngineError(f"{path}: {error}") from None
        return export

    def outline(self, name: str) -> KVEntry | None:
        """Whose file it is, and of which tokens; its keys and values are not looked at. Raises as `read` does."""
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                return _outline(self._checked(file.metadata()), file)
        except FileNotFoundError:
            return None
        except (SafetensorError, EngineError, InvalidRequest, LookupError, ValueError, TypeError) as error:
            path.unlink(missing_ok=True)
            raise EngineError(f"{path}: {error}") from None

    def remove(self, session_id: str) -> None:
        (self.folder / self.name(session_id)).unlink(missing_ok=True)

    def sweep(self) -> dict[str, int]:
        """Remove what is too old and what is too much. Name to bytes of this model's files that are left."""
        expired = self._clock() - self._ttl_s
        for found in self._found():
            if found.used < expired:
                found.path.unlink(missing_ok=True)
        for path in self.folder.glob(".*"):
            self._remove_unfinished(path)
        self._make_room(0)
        ours = self._identity[:16]
        return {each.path.name: each.num_bytes for each in self._found() if each.path.name.startswith(ours)}

    def _has_later_turn(self, export: KVExport) -> bool:
        """Whether the session went on in another process, which wrote more of the same text."""
        try:
            found = self.outline(self.name(export.session_id))
        except EngineError:
            return False
        longer = found is not None and found.length > len(export.token_ids) and found.window == export.window
        return longer and found is not None and found.shared_prefix(export.token_ids) == len(export.token_ids)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what was used longest ago until so many bytes more fit the budget, and the disk."""
        found = sorted(self._found(), key=lambda each: each.used)
        held = sum(each.num_bytes for each in found)
        limit = min(self.budget, held + shutil.disk_usage(self.folder).free)
        if num_bytes > limit:
            return False
        for each in found:
            if held + num_bytes <= limit:
                break
            each.path.unlink(missing_ok=True)
            held -= each.num_bytes
        return True

    def _found(self) -> list[_Found]:
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                about = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append(_Found(path, about.st_size, about.st_mtime))
        return found

    def _remove_unfinished(self, path: Path) -> None:
        try:
            if path.is_file() and path.stat().st_mtime < self._clock() - UNFINISHED_S:
                path.unlink()
        except FileNotFoundError:
            pass

    def _temporary(self) -> Path:
        return self.folder / f".{os.getpid()}-{next(_serial)}.part"

    def _checked(self, about: Mapping[str, str] | None) -> Mapping[str, str]:
        if about is None or about.get("format") != FORMAT:
            raise EngineError("not a file of this version")
        if about["model"] != self._identity:
            raise EngineError("of another model")
        return about


def _outline(about: Mapping[str, str], file: safe_open) -> KVEntry:
    ids: torch.Tensor = file.get_tensor("token_ids")  # type: ignore[no-untyped-call]
    return KVEntry.outline(about["session"], ids.numpy().copy(), _window(about))


def _export(about: Mapping[str, str], tensors: dict[str, torch.Tensor]) -> KVExport:
    """Raises EngineError unless it is, to the last bit, what was written."""
    if _checksum(about, tensors) != about["crc32"]:
        raise EngineError("damaged: its checksum is another")
    ids, keys, values = (tensors[name] for name in ("token_ids", "keys", "values"))
    scales = (tensors["key_scales"], tensors["value_scales"]) if "key_scales" in tensors else None
    return KVExport(about["session"], ids.numpy().astype(np.int32), keys, values, scales, _window(about))


def _tensors_of(export: KVExport) -> dict[str, torch.Tensor]:
    names = ("keys", "values", "key_scales", "value_scales")
    held = dict(zip(names, export.tensors, strict=False))
    return {"token_ids": torch.from_numpy(export.token_ids.astype(np.int32)), **held}


def _window(about: Mapping[str, str]) -> StreamingWindow | None:
    values = json.loads(about["window"])
    return None if values is None else StreamingWindow(*values)


def _checksum(about: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of what is said and what is stored, in hexadecimal."""
    said = {key: value for key, value in about.items() if key != "crc32"}
    found = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {list(tensor.shape)} {tensor.dtype}".encode(), found)
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data, found)
    return f"{found:08x}"
