"""The draft before training: which tokens it keeps, and what it takes over from its target."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from paceline.distill.shape import DraftShape
from paceline.distill.text import Rows

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Tokens:
    """The part of the target's vocabulary a draft knows.

    `kept` int64 [K], ascending: the target's ids. `nearest` int64 [vocab]: of every id, the index of a kept one.
    `index` int64 [vocab]: of a kept id its index, of another -1.
    """

    kept: torch.Tensor
    nearest: torch.Tensor
    index: torch.Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.kept.to(device), self.nearest.to(device), self.index.to(device))


def choose_tokens(counts: torch.Tensor, keep: int, special: Collection[int], embedding: torch.Tensor) -> Tokens:
    """The `keep` most frequent ids, special ones in any case. `counts` is [ids]; `embedding` [vocab, hidden].

    A model's vocabulary may be larger than its tokenizer's; ids nobody writes are kept last. Any other id is read
    as the kept one whose embedding in the target points most nearly the same way.
    """
    vocab = len(embedding)
    weight = torch.zeros(vocab)
    weight[: len(counts)] = counts[:vocab].float().cpu()
    weight[[token for token in special if 0 <= token < vocab]] = torch.inf
    # Of equals the lower id: in a byte-pair vocabulary that is the more frequent one.
    order = torch.sort(weight, descending=True, stable=True).indices
    kept = order[:keep].sort().values
    index = torch.full((vocab,), -1)
    index[kept] = torch.arange(len(kept))
    return Tokens(kept, _nearest(kept, index, embedding.detach()), index)


def new_draft(
    shape: DraftShape, tokens: Tokens, counts: torch.Tensor, target: PreTrainedModel, seed: int
) -> LlamaForCausalLM:
    """Fresh layers under the target's embedding, which is reduced to the draft's width by its principal directions.

    Those keep most of the angles between frequent tokens, so the draft does not learn from nothing what is alike.
    """
    torch.manual_seed(seed)
    config = target.config.get_text_config(decoder=True)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.get("rope_theta", 10000.0)
    draft = LlamaForCausalLM(
        shape.config(
            max_position_embeddings=int(getattr(config, "max_position_embeddings", 0) or 2048),
            rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        )
    )
    draft.set_attn_implementation("sdpa")
    with torch.no_grad():
        embedding = target.get_input_embeddings().weight.detach().float().cpu()[tokens.kept]
        draft.model.embed_tokens.weight.copy_(_reduced(embedding, counts[tokens.kept], shape.hidden))
        for layer in draft.model.layers:
            # Each adds to the same stream: smaller steps at first, or a deep draft starts loud.
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * shape.layers) ** -0.5)
    draft.tie_weights()
    return draft


class DraftBody(nn.Module):
    """Hidden states of rows of text in the target's ids."""

    def __init__(self, draft: LlamaForCausalLM, tokens: Tokens) -> None:
        super().__init__()
        self.draft = draft
        self.register_buffer("nearest", tokens.nearest, persistent=False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nearest: torch.Tensor = self.nearest  # type: ignore[assignment]
        states: torch.Tensor = self.draft.model(
            input_ids=nearest[tokens.long()], attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return states

    def states(self, rows: Rows) -> torch.Tensor:
        found: torch.Tensor = self(rows.tokens, rows.mask(), rows.positions())
        return found

    @property
    def head(self) -> torch.Tensor:
        """[K, hidden]"""
        weight: torch.Tensor = self.draft.lm_head.weight
        return weight


def _nearest(kept: torch.Tensor, index: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    unit = nn.functional.normalize(embedding.float(), dim=-1)
    mine = unit[kept.to(unit.device)]
    nearest = index.clone()
    others = (index < 0).nonzero().flatten()
    for part in torch.split(others, CHUNK):
        nearest[part] = (unit[part.to(unit.device)] @ mine.T).argmax(dim=-1).to(nearest.device)
    return nearest


def _reduced(embedding: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """`embedding` [K, hidden] in `width` coordinates; entries of root mean square 1 / sqrt(width)."""
    weight = (counts.float().cpu() + 1.0).sqrt()
    covariance = embedding.T @ (embedding * (weight / weight.sum())[:, None])
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :width]
    found: torch.Tensor = embedding @ directions
    if found.shape[1] < width:
        found = torch.cat([found, torch.zeros(len(found), width - found.shape[1])], dim=1)
        found = found + 0.1 * found.square().mean().sqrt() * torch.randn_like(found)
    return found.mul_(width**-0.5 / found.square().mean().sqrt())
