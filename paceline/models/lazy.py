"""A model whose weights stay in its files: each module's are read just before it runs, and dropped after.

Transformers builds the modules without weights, accelerate's hooks bring them. So a model can run, and be taken apart
module by module, in the memory of its largest weight. Only a checkpoint that holds all of the model's weights under
their own names is opened this way: whatever Transformers would rename, convert or fill in needs `load_causal_lm`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FLOATS = ("F16", "BF16", "F32")
"""safetensors' names of the types that are numbers as they are, not a quantization's codes."""

Index = dict[str, dict[str, str]]
"""Where each weight is: accelerate's own form."""


def empty_causal_lm(config: PretrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its own eager attention and without weights: they are on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def with_weights_in_files(model: PreTrainedModel, path: Path) -> PreTrainedModel | str:
    """An empty model that can run on the CPU with the folder's weights, or why these must be loaded whole.

    `accelerate.utils.align_module_device(module)` gives a module its weights for as long as they are needed.
    """
    from accelerate import dispatch_model

    if getattr(model.config, "quantization_config", None) is not None:
        return "its checkpoint is quantized"
    index = _index(path, model)
    if isinstance(index, str):
        return index
    with _without_warning():
        return dispatch_model(model, {"": "disk"}, main_device="cpu", offload_index=index)


def _index(path: Path, model: PreTrainedModel) -> Index | str:
    """Every weight of the model in the folder's files, or which one is not there as expected.

    Other names in the files are ignored, as Transformers does.
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    index: Index = {}
    try:
        for file in _files(path):
            index |= _weights(file, wanted)
    except (OSError, ValueError, KeyError) as error:
        return f"its files cannot be read weight by weight ({' '.join(str(error).split())[:100]})"
    for one, other in model.all_tied_weights_keys.items():
        stored = index.get(other) or index.get(one)
        if stored is not None:
            index = {one: stored, other: stored} | index
    if missing := sorted(wanted.keys() - index.keys()):
        return f"its files hold {len(missing)} weights under other names ({missing[0]})"
    if any(name not in wanted for name in model.state_dict()):
        return "it stores more than its modules' weights"
    return index


def _files(path: Path) -> list[Path]:
    sharded = path / "model.safetensors.index.json"
    if not sharded.is_file():
        return [path / "model.safetensors"]
    return [path / name for name in sorted(set(json.loads(sharded.read_text())["weight_map"].values()))]


def _weights(file: Path, wanted: dict[str, tuple[int, ...]]) -> Index:
    """What one file holds. Raises ValueError if a weight has another shape than the model's, or is no plain number."""
    from safetensors import SafetensorError, safe_open

    found: Index = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in wanted.keys() & set(opened.keys()):
                stored: Any = opened.get_slice(name)
                if stored.get_dtype() not in FLOATS or tuple(stored.get_shape()) != wanted[name]:
                    raise ValueError(f"{name} is {stored.get_dtype()} {stored.get_shape()}")
                found[name] = {"safetensors_file": str(file), "weight_name": name}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return found


def stored_rows(path: Path, name: str, count: int) -> torch.Tensor | None:
    """The first rows of one matrix in a folder's files, float32 [count, inputs]; None if it is not there as numbers."""
    from safetensors import SafetensorError, safe_open

    try:
        for file in _files(path):
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    rows = opened.get_slice(name)
                    return rows[:count].float() if rows.get_dtype() in FLOATS else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return None


@contextmanager
def _without_warning() -> Iterator[None]:
    """accelerate warns that weights are offloaded; they are meant to be."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
