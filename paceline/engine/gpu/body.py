"""What computes a step's logits from its inputs on a GPU, in a graph or not."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from paceline.engine.gpu.attention import PagedAttention, PagedStep
from paceline.engine.gpu.inputs import Batch
from paceline.engine.runner import ModelRunner


class Body(ABC):
    """A model's forward pass over keys and values in blocks."""

    shape: ModelRunner
    """Knows the model's sizes; may have no weights."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """What a step reads of the weights, small vectors apart: of an embedding it reads a row for each token."""

    @abstractmethod
    def logits(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [rows wanted, vocab], in `out` if it is given."""

    def place_for_logits(self, rows: int) -> torch.Tensor | None:  # noqa: ARG002  (most have none)
        """Memory for logits of so many rows that they need not be copied to; None: any will do."""
        return None


class OwnCode(Body):
    """A Transformers model that runs its own code, all but attention."""

    def __init__(self, runner: ModelRunner, attention: PagedAttention) -> None:
        self.shape, self._attention = runner, attention

    @property
    def weight_bytes(self) -> int:
        linears = (each for each in self.shape.model.modules() if isinstance(each, torch.nn.Linear))
        return sum(each.weight.nbytes for each in linears)

    @torch.inference_mode()
    def logits(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        found = self.shape.model(
            input_ids=batch.ids[None].long(),
            position_ids=batch.positions[None].long(),
            use_cache=False,
            logits_to_keep=0 if batch.sampled is None else batch.sampled,
            paceline_step=PagedStep(batch, self._attention),
        ).logits[0]
        return found.float() if out is None else out.copy_(found)
