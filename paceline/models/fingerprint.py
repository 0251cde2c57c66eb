"""Do two folders hold the same weights? Told from samples: reading all of them takes as long as loading does."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES = 64
SAMPLE_BYTES = 256
WEIGHTS = (".safetensors", ".bin", ".gguf")


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 (hex) of the model's config and, of each file of weights, its name, its size and samples all over it.

    Equal for copies of one folder; a model that was trained further, or rounded, differs nearly everywhere.
    """
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json":
            found.update(file.read_bytes())
        elif file.suffix in WEIGHTS:
            size = file.stat().st_size
            found.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                for place in range(SAMPLES):
                    stream.seek(size * place // SAMPLES)
                    found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()
