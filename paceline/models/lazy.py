"""A model whose weights stay in its files: each module's are read just before it runs, and dropped after.

Transformers builds the modules without weights, accelerate's hooks bring them. So a model can run, and be taken apart
module by module, in the memory of its largest weight. Only a checkpoint that holds all of the model's weights under
their own names is opened this way: whatever Transformers would rename, convert or fill in needs `load_causal_lm`.
Weights that are packed integers are unpacked on the way (`paceline.models.prequantized`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.models.files import weight_files
from paceline.models.prequantized import UnpackedWeights, quantization_method, unpacked_weights

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

    unpacked = unpacked_weights(path, model.config, "cpu")
    if unpacked is None and (method := quantization_method(model.config)) is not None:
        return f"its checkpoint is {method}'s"
    index = _index(path, model) if unpacked is None else _unpacked_index(unpacked, model)
    if isinstance(index, str):
        return index
    with _without_warning():
        return dispatch_model(model, {"": "disk"}, main_device="cpu", state_dict=unpacked, offload_index=index)


def with_weights_read_from(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """An empty model that can run on the CPU with such weights, each of which is asked for when it is needed."""
    from accelerate import dispatch_model

    with _without_warning():
        return dispatch_model(model, {"": "disk"}, main_device="cpu", state_dict=weights, offload_index={})


def _index(path: Path, model: PreTrainedModel) -> Index | str:
    """Every weight of the model in the folder's files, or which one is not there as expected.

    Other names in the files are ignored, as Transformers does.
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    index: Index = {}
    try:
        for file in weight_files(path):
            index |= _weights(file, wanted)
    except (OSError, ValueError, KeyError) as error:
        return f"its files cannot be read weight by weight ({' '.join(str(error).split())[:100]})"
    for one, other in model.all_tied_weights_keys.items():
        stored = index.get(other) or index.get(one)
        if stored is not None:
            index = {one: stored, other: stored} | index
    return _lacking(model, wanted.keys() - index.keys()) or index


def _unpacked_index(unpacked: UnpackedWeights, model: PreTrainedModel) -> Index | str:
    """Nothing more than what is unpacked, or which weight is not there as expected."""
    for one, other in model.all_tied_weights_keys.items():
        stored = other if other in unpacked else one
        for name in (one, other):
            if name not in unpacked and stored in unpacked:
                unpacked.alias(name, stored)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    for name, shape in wanted.items():
        if name in unpacked and unpacked.shape(name) != shape:
            return f"{name} is {list(unpacked.shape(name))}"
    return _lacking(model, wanted.keys() - set(unpacked)) or {}


def _lacking(model: PreTrainedModel, missing: Set[str]) -> str | None:
    """What of a model is not in its files under its own name."""
    if missing:
        return f"its files hold {len(missing)} weights under other names ({min(missing)})"
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    more = any(name not in wanted for name in model.state_dict())
    return "it stores more than its modules' weights" if more else None


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
        for file in weight_files(path):
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
