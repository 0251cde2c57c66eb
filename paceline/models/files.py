"""The weights' files in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path


def weight_files(path: Path) -> list[Path]:
    """Of a folder, one or its shards. Raises OSError, ValueError or KeyError if its index is not readable."""
    sharded = path / "model.safetensors.index.json"
    if not sharded.is_file():
        return [path / "model.safetensors"]
    return [path / name for name in sorted(set(json.loads(sharded.read_text())["weight_map"].values()))]
