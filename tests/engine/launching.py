"""A runner that launches steps as one on a GPU does, as far as its caller can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import Window
from paceline.engine.kv_blocks import BlockPool
from paceline.engine.kv_entry import KVGeometry
from paceline.engine.kv_memory import KVMemory
from paceline.engine.runner import Launched, ModelRunner
from paceline.speculation import sampling
from paceline.speculation.sampling import Rows
from tests import tiny


class Launch(Launched):
    """Its tokens are drawn; reading them is noted. Its logits are gone when the next step is launched."""

    def __init__(self, number: int, logits: torch.Tensor, drawn: list[int], notes: list[str]) -> None:
        self.number, self._logits, self.drawn, self._notes = number, logits, drawn, notes

    @property
    def logits(self) -> torch.Tensor:
        return self._logits

    def tokens(self) -> list[int]:
        self._notes.append(f"read {self.number}")
        return list(self.drawn)


class LaunchingRunner(ModelRunner):
    """Keys and values lie in blocks of `block` tokens. `notes` tells launches and readings in their order, with what
    was run at once in between. Steps of more than `most_rows` are not launched."""

    def __init__(self, model: PreTrainedModel, block: int = 16, most_rows: int = 10_000) -> None:
        super().__init__(tiny.ours(model).model)
        self.block, self.most_rows = block, most_rows
        self.notes: list[str] = []
        self.launched = 0
        self._last: Launch | None = None

    def kv_memory(self, geometry: KVGeometry, capacity: int, max_model_len: int) -> KVMemory:
        return BlockPool(geometry, capacity, self.block)

    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        self.notes.append("run")
        return super().run(windows)

    def launch(
        self, windows: Sequence[Window], rows: Sequence[Rows], feeds: Sequence[int] | None = None
    ) -> Launched | None:
        if sum(len(window.token_ids) for window in windows) > self.most_rows:
            return None
        # What was drawn before is not known.
        if any(each.params.adjusts or (each.matcher and feeds is not None) for each in rows):
            return None
        before = self._last
        if feeds is not None:
            assert before is not None and all(len(window.token_ids) == 1 for window in windows)
            pairs = zip(windows, feeds, strict=True)
            windows = [replace(window, token_ids=[before.drawn[feed]]) for window, feed in pairs]
        logits = super().run(windows).clone()  # an inference tensor could not be written to
        drawn = [token for run in sampling.draw(logits, list(rows)) for token in run]
        if before is not None:
            before.logits.fill_(float("nan"))
        self.launched += 1
        self._last = Launch(self.launched, logits, drawn, self.notes)
        self.notes.append(f"launch {self.launched}")
        return self._last
