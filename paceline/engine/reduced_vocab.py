"""A draft over a part of its target's vocabulary, under the target's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.kv_memory import KVMemory
from paceline.engine.runner import Launched, Runner
from paceline.speculation.sampling import Columns, Rows


class ReducedVocabRunner(Runner):
    """Takes the target's ids; its logits have a column for each of those it can draw, and none for the others.

    The coupled noise is a function of the target's ids, so it stays the same on both sides. `kept` are the ids
    of the draft's tokens in ascending order, int64 [K]; `nearest` [vocab] maps every id to one of the K.
    """

    def __init__(self, runner: Runner, kept: torch.Tensor, nearest: torch.Tensor) -> None:
        assert runner.vocab_size == len(kept), f"{runner.vocab_size} tokens in the draft, {len(kept)} kept"
        self._runner = runner
        self._nearest: list[int] = nearest.tolist()
        self._kept: list[int] = kept.tolist()
        self._columns = Columns(kept.to(runner.device), len(self._nearest))
        runner.name_columns(kept)

    @property
    def vocab_size(self) -> int:
        return len(self._nearest)

    @property
    def columns(self) -> Columns:
        return self._columns

    @property
    def max_model_len(self) -> int:
        return self._runner.max_model_len

    @property
    def device(self) -> torch.device:
        return self._runner.device

    def kv_geometry(self) -> KVGeometry:
        return self._runner.kv_geometry()

    def key_shift(self) -> KeyShift | str:
        return self._runner.key_shift()

    def kv_memory(self, geometry: KVGeometry, capacity: int, max_model_len: int) -> KVMemory:
        return self._runner.kv_memory(geometry, capacity, max_model_len)

    def warm_up(self, memory: KVMemory) -> int:
        return self._runner.warm_up(memory)

    def close(self) -> None:
        self._runner.close()

    @property
    def launches(self) -> bool:
        return self._runner.launches

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        return self._runner.run(self._under_own_ids(windows))

    def launch(
        self, windows: Sequence[Window], rows: Sequence[Rows], feeds: Sequence[int] | None = None
    ) -> Launched | None:
        launched = self._runner.launch(self._under_own_ids(windows), rows, feeds)
        return None if launched is None else _UnderTargetsIds(launched, self._kept)

    def _under_own_ids(self, windows: Sequence[Window]) -> list[Window]:
        nearest = self._nearest
        return [replace(window, token_ids=[nearest[token] for token in window.token_ids]) for window in windows]


class _UnderTargetsIds(Launched):
    """A launch whose tokens are the target's."""

    def __init__(self, launched: Launched, kept: list[int]) -> None:
        self._launched, self._kept = launched, kept

    @property
    def logits(self) -> torch.Tensor:
        return self._launched.logits

    def tokens(self) -> list[int]:
        return [self._kept[token] for token in self._launched.tokens()]
