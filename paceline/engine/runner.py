"""One forward pass over a ragged batch of windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import ATTENTION_NAME, Window
from paceline.engine.kv_cache import KVGeometry
from paceline.errors import ModelError


class Runner(ABC):
    """What the engine and the drafter need of a model."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Longest prompt plus output the model was made for, in tokens."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def kv_geometry(self) -> KVGeometry:
        """The shape of one token's keys and values in this model."""

    @abstractmethod
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        """Logits of every sampled row, in the order of the windows: float32 [sum of `sample`, vocab].

        Keys and values are written at each window's positions; the entries' lengths are the caller's to
        advance, once it knows what stays.
        """

    def flatten(self, windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and sampled rows of a batch, each int64 [n], laid end to end."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for window in windows:
            ids.extend(window.token_ids)
            positions.extend(range(window.start, window.end))
            rows.extend(range(len(ids) - window.sample, len(ids)))
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (ids, positions, rows))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ModelRunner(Runner):
    """Runs a Transformers causal language model whose attention is ours."""

    model: PreTrainedModel

    def __post_init__(self) -> None:
        kind = type(self.model).__name__
        if not getattr(self.model, "_supports_attention_backend", False):
            raise ModelError(
                f"{kind} does not take Transformers' AttentionInterface, which the engine needs; "
                "use a family that does, such as Llama, Qwen2, Qwen3, Mistral, SmolLM3 or OLMo2"
            )
        if self.model.config._attn_implementation != ATTENTION_NAME:
            raise ModelError(f"{kind} was loaded with attention {self.model.config._attn_implementation!r}")

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def max_model_len(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def kv_geometry(self) -> KVGeometry:
        config = self.model.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return KVGeometry(config.num_hidden_layers, kv_heads, head_dim, self.model.dtype, self.device)

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        ids, positions, rows = self.flatten(windows)
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            windows=windows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()
