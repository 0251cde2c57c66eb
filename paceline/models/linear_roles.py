"""Which linear layers of a decoder make a width and which take it up again, by what Transformers or DeepSpeed know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

COLUMN, ROW = "colwise", "rowwise"
"""How the names of Transformers' styles begin."""


@dataclass(frozen=True, slots=True)
class Block:
    """Linear layers of one module, an attention or an MLP: `columns` make what `row` takes, which is `width` wide."""

    name: str
    columns: Mapping[str, nn.Linear]
    row: str
    width: int
    hidden: int
    """Outputs of `row`."""


def uncut(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(f"{model.config.model_type}: {why}; set tensor_parallel_size: 1")


def blocks(model: PreTrainedModel) -> list[Block]:
    """In the model's order. Raises ModelError for what is arranged differently."""
    from torch import nn

    if not model._can_set_attn_implementation():
        raise uncut(model, "its attention is its own, which knows all heads")
    if any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()):
        raise uncut(model, "its experts are not cut yet")
    roles = _transformers_roles(model) or _deepspeed_roles(model)
    if not roles:
        raise uncut(model, "neither Transformers nor DeepSpeed (if it is installed) has a tensor-parallel plan for it")
    inside: dict[str, dict[str, nn.Linear]] = {}
    for name in roles:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise uncut(model, f"{name} is a {type(linear).__name__}")
        parent, _, last = name.rpartition(".")
        inside.setdefault(parent, {})[last] = linear
    return [_block(model, parent, linears, roles) for parent, linears in inside.items()]


def _block(model: PreTrainedModel, parent: str, linears: dict[str, nn.Linear], roles: Mapping[str, str]) -> Block:
    rows = [name for name in linears if roles[f"{parent}.{name}"] == ROW]
    if len(rows) != 1 or len(linears) < 2:
        raise uncut(model, f"{parent} is not cut yet")
    row = linears[rows[0]]
    columns = {name: linear for name, linear in linears.items() if name != rows[0]}
    return Block(parent, columns, rows[0], row.in_features, row.out_features)


def _transformers_roles(model: PreTrainedModel) -> dict[str, str]:
    """By the modules' names; whatever is said to be replicated is left out."""
    text = model.config.get_text_config(decoder=True)
    plan: Mapping[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    styles = [(_pattern(f"{model.base_model_prefix}.{key}"), style) for key, style in plan.items()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    roles = {}
    for name, module in model.named_modules():
        if module in ends:
            continue
        style = next((style for pattern, style in styles if pattern.fullmatch(name)), "replicated")
        role = next((role for role in (COLUMN, ROW) if style.startswith(role)), None)
        if role is not None:
            roles[name] = role
        elif not style.startswith("replicated"):
            raise uncut(model, f"{name} ({style}) is not cut yet")
    return roles


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*", r"\d+"))


def _deepspeed_roles(model: PreTrainedModel) -> dict[str, str]:
    """AutoTP finds the layers whose results are summed, by class of decoder layer; all other linear layers of it make
    what these take."""
    from torch import nn

    try:
        from deepspeed.module_inject.auto_tp import AutoTP
    except ImportError:
        return {}
    found: Any
    try:
        found = AutoTP.tp_parser(model)
    except AssertionError:
        return {}
    roles = {}
    for kind, rows in found:
        layers = [(name, module) for name, module in model.named_modules() if type(module) is kind]
        for layer, module in layers:
            for name, part in module.named_modules():
                if isinstance(part, nn.Linear):
                    is_row = any(f".{name}".endswith(row) for row in rows)
                    roles[f"{layer}.{name}"] = ROW if is_row else COLUMN
    return roles
