"""Models whose other rank is a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.tp.follower import follow
from paceline.engine.tp.group import Meeting
from paceline.engine.tp.leader import Leader
from paceline.engine.tp.runner import ShardedRunner
from paceline.errors import PacelineError
from tests import tiny
from tests.engine.tp.forks import forks

SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1, "kv_tokens": 4096, "max_num_seqs": 8}


@contextmanager
def loaded(path: Path, ranks: int, **settings: Any) -> Iterator[LoadedModel]:
    """A model of one rank or two, which end with the block."""
    chosen = EngineSettings(**SETTINGS | {"tensor_parallel_size": ranks} | settings)
    model = load_model(path, chosen, forked(path, chosen) if ranks == 2 else None)
    try:
        yield model
    finally:
        model.close()


def forked(path: Path, settings: EngineSettings) -> Leader:
    """Start rank 1. What `local_ranks` does, but in no time."""
    leader = Leader.open(settings)
    forks().Process(target=_follow, args=(path, settings, leader.meeting), daemon=True).start()
    return leader


def _follow(path: Path, settings: EngineSettings, meeting: Meeting) -> None:
    with suppress(PacelineError):  # rank 0 is told
        follow(path, settings, meeting, 1)


def folder_of(path: Path, model: PreTrainedModel) -> Path:
    """The model's files, and a tokenizer."""
    model.save_pretrained(path)
    tiny.save_tokenizer(path)
    return path


def other_rank(model: LoadedModel) -> int:
    """The process of rank 1."""
    assert isinstance(model.runner, ShardedRunner)
    return model.runner.leader.pids[1]
