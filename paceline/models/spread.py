"""A model that is larger than one device: its modules on several, and on disk, brought where they run."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Spread:
    """Where accelerate may put modules: bytes by device ("cpu", or a GPU's number); what is left goes to disk, into the
    folder if the checkpoint's own files do not hold it as it is. None is a temporary one, for the model's life."""

    max_memory: Mapping[int | str, int]
    offload_folder: str | None = None
    _temporary: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)

    def options(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        return {"device_map": "auto", "max_memory": dict(self.max_memory), "offload_folder": self._folder()}

    def belongs_to(self, model: PreTrainedModel) -> None:
        """Keep the temporary folder as long as the model that was loaded with it."""
        for folder in self._temporary:
            weakref.finalize(model, folder.cleanup)

    def _folder(self) -> str:
        if self.offload_folder is not None:
            return str(Path(self.offload_folder).expanduser())
        self._temporary.append(tempfile.TemporaryDirectory(prefix="paceline-offload-"))
        return self._temporary[-1].name


def main_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs go and its results come from; parts of it may be elsewhere."""
    import torch

    hook = getattr(model, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    found = next((place for each in hooks if (place := getattr(each, "execution_device", None)) is not None), None)
    if found is None:
        return torch.device(model.device)
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether its layers run on several devices, or wait elsewhere than where they run."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return len(places) > 1 or "disk" in places
