"""A model whose layers run on several devices, over a KV cache that lies on the first.

A token's query, key and value are some kilobytes a layer: they go to where the KV is, and the result comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from paceline.engine.attention import AttentionStep, Scoring, Window
from paceline.engine.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class AttentionElsewhere(AttentionStep):
    """Another step's attention, computed on `device` whatever device a layer is on."""

    step: AttentionStep
    device: torch.device

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        if scoring.sinks is not None:
            scoring = replace(scoring, sinks=scoring.sinks.to(self.device))
        q, k, v = (each.to(self.device) for each in (query, key, value))
        return self.step.attend(layer, q, k, v, scoring).to(query.device)


class SpreadRunner(ModelRunner):
    """A ModelRunner whose KV cache is on the model's main device."""

    def _step(self, windows: Sequence[Window]) -> AttentionStep:
        return AttentionElsewhere(super()._step(windows), self.device)
