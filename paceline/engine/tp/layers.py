"""Where a rank's share of a model meets the others': the sums and gathers between its layers.

    ids ─► rows of the embedding this rank has, zeros for others ─► sum ─► layers ─► its columns of the logits ─► gather
                                             a layer: its heads ─► sum ─► its part of the MLP ─► sum

So all ranks have the same activations between layers, to the last bit, and the same logits: whatever is decided by them
is decided alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.engine.tp.group import Group
from paceline.models.cuts import Ranges
from paceline.models.sharding import ShardPlan


class Seams:
    """What a share's own forward pass calls. `rows` are the ranks' parts of the vocabulary."""

    def __init__(self, group: Group, rows: Ranges) -> None:
        self.group = group
        self._own = rows[group.rank]
        self._widths = [len(one) for one in rows]

    def embed(self, ids: torch.Tensor, look_up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Embeddings [..., hidden] of ids [...], of which `look_up` knows this rank's rows, counted from its first."""
        local, elsewhere = self.local_ids(ids)
        return self.embedded(look_up(local), elsewhere)

    def local_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of this rank's rows, any for ids of other ranks; and which those are, both of the shape of `ids`."""
        local = ids - self._own.start
        elsewhere = (local < 0) | (local >= len(self._own))
        return local.masked_fill(elsewhere, 0), elsewhere

    def embedded(self, rows: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
        return self.sum(rows.masked_fill(elsewhere[..., None], 0))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(x.contiguous())

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """All columns [..., vocab] of logits [..., own rows]."""
        flat = self.group.all_gather(logits.reshape(-1, logits.shape[-1]), self._widths)
        return flat.view(*logits.shape[:-1], flat.shape[-1])


def join_ranks(model: PreTrainedModel, plan: ShardPlan, group: Group) -> Seams:
    """Make a rank's share compute what the whole model does, whenever all ranks run theirs at once."""
    seams = Seams(group, plan.rows)

    def sum_up(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return seams.sum(output)

    def gather(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return seams.gather(output)

    for name in plan.summed:
        model.get_submodule(name).register_forward_hook(sum_up)
    model.get_submodule(plan.head).register_forward_hook(gather)
    lookup = _Lookup(seams)
    embedding = model.get_submodule(plan.embedding)
    embedding.register_forward_pre_hook(lookup.before)
    embedding.register_forward_hook(lookup.after)
    return seams


class _Lookup:
    """Hooks around an embedding."""

    def __init__(self, seams: Seams) -> None:
        self._seams = seams
        self._elsewhere = torch.empty(0)

    def before(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        local, self._elsewhere = self._seams.local_ids(inputs[0])
        return (local,)

    def after(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return self._seams.embedded(output, self._elsewhere)
