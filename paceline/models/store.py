"""The cache on disk: finished model folders, unfinished downloads, one lock per model.

    <cache>/models/<key>/        config.json, *.safetensors, tokenizer files, paceline.json
    <cache>/models/.<key>.<n>/   a folder being written; renamed when it is complete
    <cache>/downloads/           wheels and GGUF files on their way; `.partial` until their hash is right
    <cache>/locks/<key>.lock     held while a model is fetched and converted

A folder is *ready* when its manifest (paceline.json) is of this format and every file it lists is there
with the listed size. The manifest is written last and the folder appears by one rename, so a reader never
sees half a model; the sizes catch what a full disk or a power cut left behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from paceline.errors import ModelError
from paceline.models.catalogue import CatalogueEntry, catalogue
from paceline.models.progress import Progress

MANIFEST = "paceline.json"
FORMAT = 2
"""Raised when conversion changes what it writes; folders of another format are made anew."""

LOCK_TIMEOUT_S = 3600.0


class ModelState(StrEnum):
    READY = "ready"
    PARTIAL = "partial"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One line of `paceline models list`. `size` is bytes on disk now."""

    name: str
    state: ModelState
    size: int
    path: Path


def folder_of(cache: Path, key: str) -> Path:
    return cache / "models" / key


def downloads_of(cache: Path) -> Path:
    return cache / "downloads"


def wheel_path(cache: Path, entry: CatalogueEntry) -> Path:
    return downloads_of(cache) / f"{entry.key}.whl"


def gguf_path(cache: Path, entry: CatalogueEntry) -> Path:
    return downloads_of(cache) / f"{entry.key}.gguf"


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def ready(folder: Path) -> bool:
    """Whether `folder` holds a complete model. Reads, never writes: the cache may be on a read-only disk."""
    manifest = _read_manifest(folder)
    if manifest is None or manifest.get("format") != FORMAT:
        return False
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return False
    return all(_size(folder / name) == size for name, size in files.items())


@contextmanager
def locked(cache: Path, key: str, progress: Progress) -> Iterator[None]:
    """Hold the model's lock. It is the kernel's, so a killed process leaves none behind.

    Raises ModelError if another process keeps it for an hour.
    """
    from filelock import FileLock, Timeout

    path = cache / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with progress.task("waiting for another process that prepares this model"):
                lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise ModelError(f"{path}: held by another process for over an hour; end that process and try again") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; gone afterwards unless it was published.

    Call with the model's lock held: what a killed process left in its place is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # A new name each time: a converter whose parent was killed may still be writing into the old one.
    path = folder.with_name(f".{folder.name}.{os.getpid()}")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(path: Path, folder: Path, *, name: str, origin: str) -> None:
    """Turn the staging folder `path` into the finished `folder`: manifest, flush, rename."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    manifest = {
        "format": FORMAT,
        "name": name,
        "origin": origin,
        "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
    }
    marker = path / MANIFEST
    marker.write_text(json.dumps(manifest, indent=2) + "\n")
    mode = marker.stat().st_mode & 0o777  # safetensors writes 0600; other users may share the cache
    for file in [*files, marker]:
        file.chmod(mode)
        _flush(file)
    if folder.exists():
        shutil.rmtree(folder)
    path.replace(folder)


def require_space(path: Path, needed: int) -> None:
    """Raise ModelError unless the disk of `path` (made if missing) has `needed` bytes free."""
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ModelError(
            f"{path}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; free some or set PACELINE_CACHE "
            "to a folder on another disk"
        )


def cached(cache: Path | None = None) -> list[CachedModel]:
    """What the cache holds: every catalogue model, then every converted GGUF file.

    Models from the Hub stay in the Hub's own cache and local folders where they are; neither is listed.
    """
    from paceline.config import cache_dir

    root = cache or cache_dir()
    known = [_entry_state(root, entry) for entry in catalogue()]
    listed = {model.path for model in known}
    folders = sorted(path for path in (root / "models").glob("[!.]*") if path.is_dir() and path not in listed)
    return known + [_folder_state(folder) for folder in folders]


def _entry_state(cache: Path, entry: CatalogueEntry) -> CachedModel:
    folder = folder_of(cache, entry.key)
    if ready(folder):
        return CachedModel(entry.name, ModelState.READY, _tree_size(folder), folder)
    wheel, gguf = wheel_path(cache, entry), gguf_path(cache, entry)
    size = sum(_size(path) or 0 for path in (wheel, partial_of(wheel), gguf))
    return CachedModel(entry.name, ModelState.PARTIAL if size else ModelState.ABSENT, size, folder)


def _folder_state(folder: Path) -> CachedModel:
    manifest = _read_manifest(folder) or {}
    state = ModelState.READY if ready(folder) else ModelState.PARTIAL
    return CachedModel(str(manifest.get("origin", folder.name)), state, _tree_size(folder), folder)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _tree_size(folder: Path) -> int:
    return sum(_size(path) or 0 for path in folder.rglob("*") if path.is_file())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
