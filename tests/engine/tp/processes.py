"""Models whose other ranks are processes of their own, as `paceline.LLM` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.tp.runner import ShardedRunner
from tests import tiny

SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1, "kv_tokens": 4096, "max_num_seqs": 8}


@contextmanager
def loaded(path: Path, ranks: int, **settings: Any) -> Iterator[LoadedModel]:
    """A model of so many ranks, which end with the block."""
    model = load_model(path, EngineSettings(**SETTINGS | {"tensor_parallel_size": ranks} | settings))
    try:
        yield model
    finally:
        model.close()


def folder_of(path: Path, model: PreTrainedModel) -> Path:
    """The model's files, and a tokenizer."""
    model.save_pretrained(path)
    tiny.save_tokenizer(path)
    return path


def other_rank(model: LoadedModel) -> int:
    """The process of rank 1."""
    assert isinstance(model.runner, ShardedRunner)
    return model.runner.leader.pids[1]
