"""From a name to ready weights: catalogue, Hub, folders, GGUF files; and loading them.

Importing this costs milliseconds: torch, transformers, httpx and the Hub's client are imported where used.
"""

from paceline.models.catalogue import CatalogueEntry, WheelFile, catalogue
from paceline.models.fingerprint import weights_fingerprint
from paceline.models.load import eos_token_ids, load_causal_lm, load_config, load_tokenizer, tokenizer_fingerprint
from paceline.models.progress import SILENT, Progress, Task
from paceline.models.resolver import ModelFiles, resolve
from paceline.models.store import CachedModel, ModelState, cached

__all__ = [
    "SILENT",
    "CachedModel",
    "CatalogueEntry",
    "ModelFiles",
    "ModelState",
    "Progress",
    "Task",
    "WheelFile",
    "cached",
    "catalogue",
    "eos_token_ids",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "resolve",
    "tokenizer_fingerprint",
    "weights_fingerprint",
]
