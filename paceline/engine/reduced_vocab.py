"""A draft over a part of its target's vocabulary, dressed so that the engine sees the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.runner import Runner


class ReducedVocabRunner(Runner):
    """Takes and gives the target's ids. Tokens the draft cannot draw get -inf.

    The coupled noise is a function of the target's ids, so it stays the same on both sides. `kept` are the ids
    of the draft's tokens in ascending order, int64 [K]; `nearest` [vocab] maps every id to one of the K.
    """

    def __init__(self, runner: Runner, kept: torch.Tensor, nearest: torch.Tensor) -> None:
        assert runner.vocab_size == len(kept), f"{runner.vocab_size} tokens in the draft, {len(kept)} kept"
        self._runner = runner
        self._kept = kept.to(runner.device)
        self._nearest: list[int] = nearest.tolist()

    @property
    def vocab_size(self) -> int:
        return len(self._nearest)

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

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        nearest = self._nearest
        mapped = [replace(window, token_ids=[nearest[token] for token in window.token_ids]) for window in windows]
        drawn = self._runner.run(mapped)
        logits = torch.full((len(drawn), self.vocab_size), -torch.inf, device=drawn.device)
        return logits.index_copy_(1, self._kept, drawn)
