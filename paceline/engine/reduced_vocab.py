"""A draft over a part of its target's vocabulary, under the target's ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.runner import Runner
from paceline.speculation.sampling import Columns


class ReducedVocabRunner(Runner):
    """Takes the target's ids; its logits have a column for each of those it can draw, and none for the others.

    The coupled noise is a function of the target's ids, so it stays the same on both sides. `kept` are the ids
    of the draft's tokens in ascending order, int64 [K]; `nearest` [vocab] maps every id to one of the K.
    """

    def __init__(self, runner: Runner, kept: torch.Tensor, nearest: torch.Tensor) -> None:
        assert runner.vocab_size == len(kept), f"{runner.vocab_size} tokens in the draft, {len(kept)} kept"
        self._runner = runner
        self._nearest: list[int] = nearest.tolist()
        self._columns = Columns(kept.to(runner.device), len(self._nearest))

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

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        nearest = self._nearest
        return self._runner.run(
            [replace(window, token_ids=[nearest[token] for token in window.token_ids]) for window in windows]
        )
