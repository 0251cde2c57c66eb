"""The target as a teacher: its hidden states, remembered if there is room, and its distribution over kept tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from paceline.distill.text import Rows, upload
from paceline.errors import ModelError

RESERVE, RESERVE_ALONE = 12 << 30, 24 << 30
"""Bytes of a GPU left free beside remembered hidden states: training needs the larger one, but gets the writer's
cache where there was a writer."""


class TeacherHead:
    """Logits of a model's hidden states, over its whole vocabulary or the tokens kept."""

    def __init__(self, model: PreTrainedModel, kept: torch.Tensor | None = None) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embedding to learn from")
        config = model.config.get_text_config(decoder=True)
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        self.weight: torch.Tensor = weight if kept is None else weight[kept.to(weight.device)]
        self._bias: torch.Tensor | None = bias if kept is None or bias is None else bias.detach()[kept.to(bias.device)]
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = 1.0 / float(getattr(config, "logits_scaling", 1.0) or 1.0)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(states, self.weight, self._bias)
        if self._scale != 1.0:
            logits = logits * self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


class StateStore:
    """Hidden states of the first `capacity` rows of text, kept on the device: [capacity, T, hidden]."""

    def __init__(self, capacity: int, length: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self._states = torch.empty((capacity, length, hidden), dtype=dtype, device=device)
        self._known = torch.zeros(capacity, dtype=torch.bool)

    def put(self, index: torch.Tensor, states: torch.Tensor) -> None:
        """Remember the states of the rows at `index` (int64, on the CPU) as far as there is room."""
        inside = index < len(self._known)
        if bool(inside.any()):
            self._states[index[inside].to(self._states.device)] = states[inside.to(states.device)]
            self._known[index[inside]] = True

    def get(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the rows at `index` [n, T, hidden], and which of them are known, bool [n] on the CPU."""
        known = torch.zeros(len(index), dtype=torch.bool)
        inside = index < len(self._known)
        known[inside] = self._known[index[inside]]
        return self._states[upload(torch.where(known, index, 0), self._states.device)], known

    def __len__(self) -> int:
        return len(self._known)

    @property
    def full(self) -> bool:
        return bool(self._known.all())


class Teacher:
    """Hidden states of rows of text, computed where they are not remembered, and logits over the tokens kept."""

    def __init__(self, model: PreTrainedModel, kept: torch.Tensor, store: StateStore | None = None) -> None:
        model.set_attn_implementation("sdpa")
        self._model, self._store = model, store
        self.head = TeacherHead(model, kept)

    @torch.no_grad()
    def states(self, index: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[n, T, hidden] of the rows at `index` (on the CPU), whose content is `rows` (on the device)."""
        if self._store is None:
            return self.compute(rows)
        found, known = self._store.get(index)
        if not bool(known.all()):
            missing = (~known).nonzero().flatten()
            states = self.compute(rows.at(missing.to(rows.tokens.device))).to(found.dtype)
            self._store.put(index[missing], states)
            found[missing.to(found.device)] = states
        return found

    @torch.no_grad()
    def compute(self, rows: Rows) -> torch.Tensor:
        """From the text itself."""
        states: torch.Tensor = self._model.base_model(
            input_ids=rows.tokens.long(),
            attention_mask=rows.mask(),
            position_ids=rows.positions(),
            use_cache=False,
        ).last_hidden_state
        return states


def new_store(model: PreTrainedModel, length: int, reserve: int = RESERVE) -> StateStore | None:
    """As large as a GPU's free memory allows, less `reserve` bytes for training; none on a CPU."""
    if model.device.type != "cuda":
        return None
    hidden = model.config.get_text_config(decoder=True).hidden_size
    free, _ = torch.cuda.mem_get_info(model.device)
    capacity = max(0, free - reserve) // (length * hidden * model.dtype.itemsize)
    return StateStore(capacity, length, hidden, model.dtype, model.device) if capacity else None
