"""A rank's share of a model's weights, read from its files without ever holding the whole.

The model is built empty, its modules are made as narrow as the share, and each weight is read by its slices: of a plain
checkpoint no byte more than these. Weights that are packed integers are unpacked one at a time, and cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ModelError
from paceline.models import draft_folder
from paceline.models.files import weight_files
from paceline.models.lazy import FLOATS, empty_causal_lm, with_weights_read_from
from paceline.models.load import load_config
from paceline.models.prequantized import UnpackedWeights, quantization_method, unpacked_weights
from paceline.models.stored_names import stored_names

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from paceline.models.sharding import Cut, ShardPlan

HEAD_COUNTS = ("num_heads", "num_attention_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")


class Source(ABC):
    """The weights of a model folder, by their names in the files."""

    @abstractmethod
    def names(self) -> Iterable[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None:
        """None: there is no such weight."""

    @abstractmethod
    def read(self, name: str, cut: Cut | None) -> torch.Tensor:
        """A part of a weight, or all of it, as it is stored."""


class _Files(Source):
    """Plain numbers in safetensors files, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._slices: dict[str, Any] = {}
        try:
            for file in weight_files(path):
                opened: Any = safe_open(file, framework="pt")
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"{path}: cannot read the weights: {' '.join(str(error).split())[:200]}") from None

    def names(self) -> Iterable[str]:
        return self._slices

    def shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._slices.get(name)
        return None if stored is None or stored.get_dtype() not in FLOATS else tuple(stored.get_shape())

    def read(self, name: str, cut: Cut | None) -> torch.Tensor:
        import torch

        stored = self._slices[name]
        if cut is None:
            whole: torch.Tensor = stored[:]
            return whole.clone()
        before = (slice(None),) * cut.dim
        # Copied: what safetensors gives is a view of the mapped file.
        return torch.cat([stored[(*before, slice(one.start, one.stop))] for one in cut.ranges], dim=cut.dim)


class _Whole(Source):
    """Weights that come whole, one at a time."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def names(self) -> Iterable[str]:
        return self._weights

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self._weights:
            return None
        if isinstance(self._weights, UnpackedWeights):
            return self._weights.shape(name)
        return tuple(self._weights[name].shape)

    def read(self, name: str, cut: Cut | None) -> torch.Tensor:
        import torch

        whole = self._weights[name]
        if cut is None:
            return whole
        return torch.cat([whole.narrow(cut.dim, one.start, len(one)) for one in cut.ranges], dim=cut.dim)


class ShareWeights(Mapping[str, "torch.Tensor"]):
    """A rank's weights by their names in the model, each read when it is asked for."""

    def __init__(self, path: Path, source: Source, model: PreTrainedModel, plan: ShardPlan, rank: int) -> None:
        """Raises ModelError for a weight that is not there as the empty `model` has it."""
        self._source, self._plan, self._rank = source, plan, rank
        self._stored = dict.fromkeys(plan.shapes, "") | stored_names(model, source.names())
        for one, other in model.all_tied_weights_keys.items():
            self._stored[one] = self._stored[other] = self._stored[other] or self._stored[one]
        lacking = [name for name, stored in self._stored.items() if source.shape(stored) != plan.shapes.get(name)]
        more = sorted(name for name in model.state_dict() if name not in plan.shapes)
        if lacking or more:
            raise ModelError(
                f"{path}: {len(lacking or more)} weights are not in the files as the model has them "
                f"({(lacking or more)[0]}), and none of it may be loaded whole; set tensor_parallel_size: 1"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        if self._rank > 0 and self._plan.is_added_once(name):
            return torch.zeros(self._plan.shapes[name])
        return self._source.read(self._stored[name], self._plan.pieces(name, self._rank))


def load_share(
    path: Path,
    plan: ShardPlan,
    rank: int,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    in_files: bool = False,
) -> PreTrainedModel:
    """A rank's share in eval mode, with the model's own eager attention; `dtype` None is the checkpoint's, of a draft
    float16.

    With `in_files` its weights stay there, each module's being read on the CPU as it runs (`paceline.models.lazy`).
    Alone it computes a part of what the model does; `paceline.engine.tp.layers` joins it with the others. Raises
    ModelError.
    """
    import torch

    config = load_config(path)
    source = _source(path, config)
    if dtype is None:
        dtype = torch.float16 if draft_folder.is_draft(path) else config.dtype or torch.float32
    model = empty_causal_lm(config, dtype=dtype)
    weights = ShareWeights(path, source, model, plan, rank)
    narrow(model, plan, rank)
    if in_files:
        return with_weights_read_from(model, weights)
    _fill(model, weights, dtype, device)
    return model.to(device)


def narrow(model: PreTrainedModel, plan: ShardPlan, rank: int) -> None:
    """Make an empty model's modules as wide as a rank's share, and tell its code of the heads it has left."""
    import torch
    from torch import nn

    for name in plan.divisions:
        owner, _, last = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        shape, dtype = plan.shape(name, rank), getattr(module, last).dtype
        setattr(module, last, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.padding_idx = shape[0], None  # of use to training alone
    heads, kv_heads = len(plan.heads(rank)), len(plan.kv_heads(rank))
    text = model.config.get_text_config(decoder=True)
    # Where it was derived it would be derived anew, from fewer heads.
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for owner in (text, *(model.get_submodule(name) for name in plan.attentions)):
        for names, count in ((HEAD_COUNTS, heads), (KV_HEAD_COUNTS, kv_heads)):
            for attribute in names:
                if getattr(owner, attribute, None) is not None:
                    setattr(owner, attribute, count)
        if hasattr(owner, "num_key_value_groups"):
            owner.num_key_value_groups = heads // kv_heads


def _source(path: Path, config: PretrainedConfig) -> Source:
    if draft_folder.is_draft(path):
        return _Whole(draft_folder.draft_weights(path))
    unpacked = unpacked_weights(path, config, "cpu")
    if unpacked is not None:
        return _Whole(unpacked)
    if (method := quantization_method(config)) is not None:
        raise ModelError(f"{path}: a checkpoint of {method} runs in its library whole; set tensor_parallel_size: 1")
    return _Files(path)


def _fill(model: PreTrainedModel, weights: ShareWeights, dtype: torch.dtype, device: torch.device | str) -> None:
    """Weights in place of the empty ones, one at a time; tied ones once."""
    from torch import nn

    tied = model.all_tied_weights_keys
    for name in weights:
        if name not in tied:
            _set(model, name, nn.Parameter(weights[name].to(device=device, dtype=dtype), requires_grad=False))
    for name, first in tied.items():
        owner, _, last = first.rpartition(".")
        _set(model, name, getattr(model.get_submodule(owner), last))


def _set(model: PreTrainedModel, name: str, weight: torch.nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, weight)
