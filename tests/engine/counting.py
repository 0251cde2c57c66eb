"""A runner that counts what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.runner import Runner
from tests import tiny


class CountingRunner(Runner):
    """`steps` holds, for each forward pass, the tokens of each of its windows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._inner = tiny.ours(model)
        self.steps: list[list[int]] = []

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._inner.max_model_len

    @property
    def device(self) -> torch.device:
        return self._inner.device

    def kv_geometry(self) -> KVGeometry:
        return self._inner.kv_geometry()

    def key_shift(self) -> KeyShift | str:
        return self._inner.key_shift()

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        self.steps.append([len(window.token_ids) for window in windows])
        return self._inner.run(windows)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.steps))
