"""A model's shape from its configuration: Transformers builds it without weights, and what it is made of is counted.

Nothing is guessed from names: linear layers are counted by their modules, keys and values by running one token through
the empty model, as `paceline.engine.geometry` does with a loaded one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paceline.engine.attention import ATTENTION_NAME, Scoring
from paceline.engine.families import refuse_unservable
from paceline.engine.geometry import Observer, Seen, kv_geometry, max_model_len, text_config
from paceline.engine.lean import NotLeanError, refuse_other_structures
from paceline.engine.packed import SAMPLE
from paceline.errors import ModelError
from paceline.models.estimate import KVShape, Matrix, ModelShape
from paceline.models.lazy import empty_causal_lm, stored_rows
from paceline.models.sharding import ShardPlan
from paceline.models.shares import narrow


@dataclass(frozen=True, slots=True)
class _Noting(Observer):
    """Also notes how each layer scores."""

    scorings: dict[int, Scoring] = field(default_factory=dict)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        self.scorings[layer] = scoring
        return Observer.attend(self, layer, query, key, value, scoring)


@dataclass(frozen=True, slots=True)
class _Attention:
    """What the layers brought; how they score, where our attention is theirs."""

    seen: Mapping[int, Seen]
    scorings: Mapping[int, Scoring] = field(default_factory=dict)


def model_shape(config: PretrainedConfig, folder: Path | None = None, *, ranks: int = 1) -> ModelShape:
    """Of the whole model, or of the largest share that one of several `ranks` has.

    Of a few rows of the embedding in `folder`, if it is given, it is tried whether 16 bits hold them exactly. Raises
    ModelError for a kind that cannot be served, or that Transformers cannot build or run empty; ConfigError or
    ModelError if so many ranks cannot share it.
    """
    refuse_unservable(config)
    plan = ShardPlan.of(config, ranks) if ranks > 1 else None
    model = _empty(config, "eager", plan)
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(table, nn.Embedding):
        raise ModelError(f"{config.model_type}: its embedding or its head is not one matrix")
    linears = [module for module in model.modules() if _is_linear(module) and module is not head]
    experts = _experts(model)
    matrices = _matrices(linears)
    attention = _attention(config, model, plan)
    name = next(name for name, module in model.named_modules() if module is table)
    rows = None if folder is None else stored_rows(folder, f"{name}.weight", SAMPLE)
    return ModelShape(
        family=str(config.model_type),
        parameters=sum(weight.numel() for weight in model.parameters()),
        matrices=matrices,
        head=_matrix(head),
        tied=head.weight is table.weight,
        embedding=table.weight.numel(),
        experts=sum(weight.numel() for weight in experts),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        hidden=int(text_config(model).hidden_size),
        width=_width(matrices, experts, text_config(model)),
        kv=_kv_shape(attention, model),
        max_model_len=max_model_len(model),
        lean=_is_lean(config),
        itemsize=_itemsize(config) if rows is None else _narrowest(rows),
        quantized=_method(config),
        scores_kept=not all(scoring.fused for scoring in attention.scorings.values()),
    )


def _empty(config: PretrainedConfig, attention: str, plan: ShardPlan | None) -> PreTrainedModel:
    """All of it on the meta device, buffers too: nothing is allocated. With a `plan` the largest share."""
    config = copy.deepcopy(config)
    # Some families look for padding among the ids, which have no values here.
    config.get_text_config(decoder=True).pad_token_id = None
    with _in_one_line(config, "cannot be built"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if plan is not None:
        narrow(model, plan, max(range(plan.size), key=lambda rank: plan.share_bytes(rank, 1)))
    return model.eval().requires_grad_(False)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _matrix(module: Any, count: int = 1) -> Matrix:
    outputs, inputs = module.weight.shape
    transposed = isinstance(module, Conv1D)
    return Matrix(
        outputs=inputs if transposed else outputs,
        inputs=outputs if transposed else inputs,
        count=count,
        bias=module.bias is not None,
        packs=not transposed,
        quantizes=transposed or type(module) is nn.Linear,
    )


def _matrices(linears: list[nn.Module]) -> tuple[Matrix, ...]:
    """Those alike together, in the order of their first."""
    return tuple(replace(one, count=count) for one, count in Counter(map(_matrix, linears)).items())


def _experts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Weights with a dimension for the expert: [experts, …, …]."""
    return [weight for weight in model.parameters() if weight.dim() == 3]


def _width(matrices: tuple[Matrix, ...], experts: list[torch.Tensor], text: Any) -> int:
    """Of the widest activations inside a layer: a token visits several experts, and has an MLP's width in each."""
    widest = max((max(matrix.outputs, matrix.inputs) for matrix in matrices), default=0)
    each = max((max(weight.shape[1:]) for weight in experts), default=0)
    return max(widest, each * int(getattr(text, "num_experts_per_tok", None) or 1))


def _attention(config: PretrainedConfig, model: PreTrainedModel, plan: ShardPlan | None) -> _Attention:
    """By our attention if the model reaches it, as `ModelRunner` does; else by the cache it fills."""
    ids = torch.zeros((1, 1), dtype=torch.long, device="meta")
    noting = _Noting()
    try:
        ours = _empty(config, ATTENTION_NAME, plan)
        with torch.inference_mode():
            ours(input_ids=ids, position_ids=ids, use_cache=False, paceline_step=noting)
    except Exception:  # modelling code may fail in any way with an attention it was not made for
        noting.seen.clear()
    if noting.seen:
        return _Attention(noting.seen, noting.scorings)
    cache = DynamicCache()
    with _in_one_line(config, "does not run without weights"), torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = ((n, layer) for n, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None)
    return _Attention({n: Seen(tuple(layer.keys.shape), tuple(layer.values.shape)) for n, layer in layers})


def _kv_shape(attention: _Attention, model: PreTrainedModel) -> KVShape:
    """Raises ModelError where the KV cache would refuse the model."""
    text = text_config(model)
    try:
        geometry = kv_geometry(attention.seen, model)
    except ModelError as error:
        raise ModelError(f"{text.model_type} cannot be served: {error.message}") from None
    kept = geometry.num_kv_heads
    if getattr(text, "new_decoder_architecture", False):
        kept = int(text.num_kv_heads)  # Falcon repeats shared heads before it caches them; we keep one of each
    windows = [seen.sliding_window for seen in attention.seen.values() if seen.sliding_window]
    return KVShape(
        layers=geometry.num_layers,
        heads=int(text.num_attention_heads),
        kv_heads=kept,
        head_dim=geometry.head_dim,
        window=max(windows, default=None),
        sliding_layers=len(windows),
    )


def _itemsize(config: PretrainedConfig) -> int:
    """Bytes of a number in the checkpoint, as its configuration says; of float32 if it says nothing."""
    dtype = config.dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


def _narrowest(rows: torch.Tensor) -> int:
    """Bytes of a number of the smallest plain type that holds all of them, as the lean pass looks for it."""
    exact = any(torch.equal(rows.to(dtype).float(), rows) for dtype in (torch.float16, torch.bfloat16))
    return torch.float16.itemsize if exact else torch.float32.itemsize


def _method(config: PretrainedConfig) -> str:
    """Of the checkpoint's quantization, as its configuration names it."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return ""
    named = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(named, "value", named) or "some method")


def _is_lean(config: PretrainedConfig) -> bool:
    try:
        refuse_other_structures(empty_causal_lm(copy.deepcopy(config), dtype=torch.float32))
    except NotLeanError:
        return False
    return True


@contextmanager
def _in_one_line(config: PretrainedConfig, what: str) -> Iterator[None]:
    """What Transformers raises, as a ModelError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{config.model_type}: its shape {what}: {reason}") from error
