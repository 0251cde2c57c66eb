"""Which part of a model each rank has: what of every weight, found from the model without weights.

    q, k, v, gate, up     rows of the weight [out, in], by heads or by the MLP's width
    o, down               columns of the weight; what they give is summed over ranks
    embedding, head       runs of rows of the vocabulary
    all else              whole, on every rank

Which linear layer is which Transformers or DeepSpeed knows (`paceline.models.linear_roles`). How wide a part is follows
from shapes: attention is cut by whole KV heads with their queries, and the MLP so that shares of a layer are even
(`paceline.models.cuts`). A projection that fuses several is cut in each of them, so that a rank's module is the same
module of a smaller model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from paceline.models.cuts import GROUP, Ranges, head_ranges, row_ranges, width_ranges
from paceline.models.lazy import empty_causal_lm
from paceline.models.linear_roles import Block, blocks, uncut

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS, KV_HEADS, VOCABULARY = "heads", "kv_heads", "vocabulary"
NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of a weight: `ranges` of its dimension `dim`, one after the other."""

    dim: int
    ranges: tuple[range, ...]

    @property
    def length(self) -> int:
        return sum(len(one) for one in self.ranges)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive numbers of a weight's dimension, from `first` on: `unit` of them for each step of the axis."""

    axis: str
    unit: int
    first: int = 0

    def of(self, steps: range) -> range:
        return range(self.first + steps.start * self.unit, self.first + steps.stop * self.unit)


@dataclass(frozen=True, slots=True)
class Division:
    """How a weight is divided: runs of the dimension `dim`."""

    dim: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Where `size` ranks cut a model. Made by `of`."""

    size: int
    axes: Mapping[str, Ranges]
    """Each rank's heads, KV heads, rows of the vocabulary and part of each width of MLP."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every weight of the model, by its name; a tied one has two names."""
    divisions: Mapping[str, Division]
    """By the names of the weights that are cut."""
    attentions: tuple[str, ...]
    """Modules that have heads."""
    summed: tuple[str, ...]
    """Modules whose results are summed over the ranks."""
    embedding: str
    head: str
    tied: frozenset[str]
    """Second names of weights."""

    @classmethod
    def of(cls, config: PretrainedConfig, size: int, *, group: int = GROUP) -> ShardPlan:
        """Raises ConfigError if so many ranks cannot share such a model, ModelError if none can; both with the remedy.

        `group` is `engine.group_size`: inputs of an MLP's last layer that stay together where the width allows it.
        """
        import torch

        return _Planner(empty_causal_lm(copy.deepcopy(config), dtype=torch.float32), size, group).plan()

    @property
    def num_kv_heads(self) -> int:
        """Of the whole model."""
        return self.axes[KV_HEADS][-1].stop

    def heads(self, rank: int) -> range:
        return self.axes[HEADS][rank]

    def kv_heads(self, rank: int) -> range:
        return self.axes[KV_HEADS][rank]

    @property
    def rows(self) -> Ranges:
        """Each rank's rows of the vocabulary."""
        return self.axes[VOCABULARY]

    def pieces(self, name: str, rank: int) -> Cut | None:
        """A rank's part of the weight of this name; None: a copy of it."""
        division = self.divisions.get(name)
        if division is None:
            return None
        return Cut(division.dim, tuple(run.of(self.axes[run.axis][rank]) for run in division.runs))

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of a rank's part of a weight."""
        shape = list(self.shapes[name])
        if (cut := self.pieces(name, rank)) is not None:
            shape[cut.dim] = cut.length
        return tuple(shape)

    def is_added_once(self, name: str) -> bool:
        """Whether it is a bias of what is summed: the first rank's, zeros on the others."""
        module, _, last = name.rpartition(".")
        return last == "bias" and module in self.summed

    def share_bytes(self, rank: int, itemsize: int) -> int:
        """Of a rank's weights, tied ones counted once, in numbers of `itemsize` bytes."""
        return itemsize * sum(prod(self.shape(name, rank)) for name in self.shapes if name not in self.tied)

    def replicated_bytes(self, itemsize: int) -> int:
        """Of those that every rank has whole: norms, learned positions, biases of what is summed."""
        return itemsize * sum(prod(shape) for name, shape in self.shapes.items() if name not in self.divisions)


def check_size(config: PretrainedConfig, size: int) -> None:
    """Raise ConfigError, with the sizes that work, or ModelError if so many ranks cannot share such a model."""
    if size > 1:
        ShardPlan.of(config, size)


class _Planner:
    """Makes one plan."""

    def __init__(self, model: PreTrainedModel, size: int, group: int) -> None:
        text = model.config.get_text_config(decoder=True)
        self._model, self._size, self._group = model, size, group
        self._layers, self._heads = int(text.num_hidden_layers), int(text.num_attention_heads)
        self._kv_heads = int(getattr(text, "num_key_value_heads", None) or self._heads)
        self._divisions: dict[str, Division] = {}

    def plan(self) -> ShardPlan:
        found = blocks(self._model)
        attentions = {block.name: runs for block in found if (runs := self._attention(block)) is not None}
        if len(attentions) != self._layers:
            raise uncut(self._model, "its attention is not cut yet")
        queries, kept = head_ranges(self._heads, self._kv_heads, self._size)
        axes = {HEADS: queries, KV_HEADS: kept, VOCABULARY: row_ranges(self._rows(), self._size)}
        for block in found:
            if block.name in attentions:
                self._divide(block, attentions[block.name], Run(HEADS, block.width // self._heads))
                self._divide_norms(block)
                # Of a query head its rows and what they become, of a KV head its keys and its values.
                each = 2 * block.hidden * block.width // self._heads
                fixed = [each * (len(q) + len(kv)) for q, kv in zip(queries, kept, strict=True)]
        for block in found:
            if block.name not in attentions:
                axis = _width(block)
                self._divide(block, self._mlp(block), Run(axis, 1))
                cost = sum(linear.weight.numel() for linear in block.columns.values()) // block.width + block.hidden
                axes.setdefault(axis, width_ranges(block.width, fixed, cost, self._group))
        return self._made(axes, tuple(attentions), tuple(f"{block.name}.{block.row}" for block in found))

    def _made(self, axes: Mapping[str, Ranges], attentions: tuple[str, ...], summed: tuple[str, ...]) -> ShardPlan:
        names = {id(module): name for name, module in self._model.named_modules()}
        embedding = names[id(self._model.get_input_embeddings())]
        head = names[id(self._model.get_output_embeddings())]
        shapes = {name: tuple(weight.shape) for name, weight in self._model.named_parameters(remove_duplicate=False)}
        by_row = Division(0, (Run(VOCABULARY, 1),))
        ends = {name: by_row for name in shapes if name.rpartition(".")[0] in (embedding, head)}
        tied = frozenset(self._model.all_tied_weights_keys)
        return ShardPlan(self._size, axes, shapes, self._divisions | ends, attentions, summed, embedding, head, tied)

    def _attention(self, block: Block) -> Mapping[str, tuple[Run, ...]] | None:
        """How an attention's projections are divided; None if it is none, or of another kind."""
        dim = block.width // self._heads
        every, kept, k, v = Run(HEADS, dim), Run(KV_HEADS, dim), self._heads * dim, (self._heads + self._kv_heads) * dim
        known: list[dict[str, tuple[Run, ...]]] = [
            {"q_proj": (every,), "k_proj": (kept,), "v_proj": (kept,)},
            {"qkv_proj": (every, Run(KV_HEADS, dim, k), Run(KV_HEADS, dim, v))},
        ]
        if self._heads == self._kv_heads:
            # [heads, 3, dim]: a head's query, key and value beside each other.
            known.append({"query_key_value": (Run(HEADS, 3 * dim),)})
        steps = {HEADS: self._heads, KV_HEADS: self._kv_heads}
        outputs = {name: linear.out_features for name, linear in block.columns.items()}
        for runs in known:
            if outputs == {name: sum(steps[run.axis] * run.unit for run in each) for name, each in runs.items()}:
                return runs
        return None

    def _mlp(self, block: Block) -> Mapping[str, tuple[Run, ...]]:
        axis = _width(block)
        runs: dict[str, tuple[Run, ...]] = {}
        for name, linear in block.columns.items():
            halves = 2 if name == "gate_up_proj" else 1
            if linear.out_features != halves * block.width or name in ("q_proj", "k_proj", "v_proj"):
                raise uncut(self._model, f"{block.name}.{name} is not cut yet")
            runs[name] = tuple(Run(axis, 1, half * block.width) for half in range(halves))
        return runs

    def _divide(self, block: Block, runs: Mapping[str, tuple[Run, ...]], inputs: Run) -> None:
        for name, each in runs.items():
            self._divisions[f"{block.name}.{name}.weight"] = Division(0, each)
            if block.columns[name].bias is not None:
                self._divisions[f"{block.name}.{name}.bias"] = Division(0, each)
        self._divisions[f"{block.name}.{block.row}.weight"] = Division(1, (inputs,))

    def _divide_norms(self, block: Block) -> None:
        """What else an attention has: one norm for all heads stays whole, one of each head's own is cut by heads."""
        dim = block.width // self._heads
        linears = {*block.columns, block.row}
        for name, weight in self._model.get_submodule(block.name).named_parameters():
            module = name.rpartition(".")[0]
            if module in linears or (module in NORMS and weight.shape == (dim,)):
                continue
            axis = HEADS if module.startswith("q") else KV_HEADS
            count = self._heads if axis == HEADS else self._kv_heads
            if module not in NORMS or weight.shape != (count, dim):
                raise uncut(self._model, f"{block.name}.{name} spans several heads")
            self._divisions[f"{block.name}.{name}"] = Division(0, (Run(axis, 1),))

    def _rows(self) -> int:
        """Of the embedding and of the head."""
        from torch import nn

        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise uncut(self._model, "its embedding or its head is not one matrix")
        if embedding.weight.shape[0] != head.weight.shape[0]:
            raise uncut(self._model, "its head has other rows than its embedding")
        return int(embedding.weight.shape[0])


def _width(block: Block) -> str:
    return f"width {block.width}"
