"""Who says how likely a text is: the model's own code, or our engine's path with whatever it rounds and drops."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import Window
from paceline.engine.geometry import max_model_len
from paceline.engine.kv_cache import KVEntry
from paceline.engine.load import LoadedModel
from paceline.errors import ConfigError
from paceline.sessions.window import StreamingWindow


class Scorer(ABC):
    """Gives logits of a text that is known."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest text it takes."""

    @abstractmethod
    def logits(self, ids: Sequence[int], count: int) -> torch.Tensor:
        """What follows each of the last `count` of the ids: float32 [count, vocab]."""


class TransformersScorer(Scorer):
    """The model's own code, the whole text in one pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def longest(self) -> int:
        return max_model_len(self._model)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], count: int) -> torch.Tensor:
        kept = {"logits_to_keep": count} if self._keeps else {}
        tokens = torch.tensor([list(ids)], device=self._model.device)
        found: torch.Tensor = self._model(input_ids=tokens, use_cache=False, **kept).logits
        return found[0, -count:].float()


class EngineScorer(Scorer):
    """Our engine's path over its KV cache, shifting as the streaming window of its settings does.

    Prompts are computed in chunks, as prefill does. With `rows`, what is scored is computed in windows of so many
    tokens behind them: 1 is decoding, more is verification. What the KV cache holds of the text's beginning is not
    computed again.
    """

    def __init__(self, model: LoadedModel, rows: int | None = None) -> None:
        self._runner, self.kv = model.runner, model.engine().kv
        self._chunk = model.limits.max_batched_tokens
        self._rows = rows
        limits = model.limits
        self._window: StreamingWindow | None = None
        if limits.ctx_size is not None:
            self._window = StreamingWindow(limits.ctx_size, limits.n_keep, limits.n_discard)
        self._longest = min(limits.max_model_len, self.kv.usage().total)

    @property
    def longest(self) -> int:
        return self._longest

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], count: int) -> torch.Tensor:
        room = len(ids) if self._window is None else min(len(ids), self._window.ctx_size)
        begin = ids[: len(ids) - count + 1]
        entry = self.kv.reserve(begin, room, window=self._window)
        if entry is None:
            raise ConfigError(f"engine.kv_tokens: no room for {room} tokens", param="engine.kv_tokens")
        try:
            return torch.cat(list(self._passes(entry, ids, len(ids) - count)))
        finally:
            self.kv.release(entry)

    def _passes(self, entry: KVEntry, ids: Sequence[int], unscored: int) -> Iterator[torch.Tensor]:
        """Logits of each pass, until the entry holds all ids."""
        while entry.length < len(ids):
            done = entry.length
            self.kv.shift(entry)
            size = min(self._chunk, entry.left)
            if self._rows is not None:
                size = min(size, unscored - done if done < unscored else self._rows)
            chunk = ids[done : done + size]
            sample = max(0, min(len(chunk), done + len(chunk) - unscored))
            yield self._runner.run([Window(entry, chunk, sample=sample)])
            self.kv.append(entry, chunk)
