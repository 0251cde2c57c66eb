"""A lean forward pass on a CPU for models built like Llama: eight calls a layer instead of some forty.

Fused QKV and gate/up projections, our kernels between them, keys and values written in place, attention over
true lengths. Which families this covers is not a list of names: a model is taken apart by its modules, and the
result is used only if it reproduces the model's own logits on a probe (`lean_runner`). Weights are taken one product
at a time, so that a model whose weights lie in files (`paceline.models.lazy`) never lies in memory whole.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from paceline.engine.attention import ATTENTION_NAME, Window
from paceline.engine.geometry import text_config
from paceline.engine.key_shift import KeyShift, Rotation
from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.native import HeadsStruct, Kernels, LayerStruct, WindowStruct
from paceline.engine.packed import PackedWeight
from paceline.engine.products import Pack, Product
from paceline.engine.runner import ModelRunner, Runner
from paceline.engine.tp.layers import Seams
from paceline.errors import EngineError, ModelError
from paceline.models.positions import shift_refusal

PROBE_TOKENS = 24
PROBE_TOLERANCE = 0.05
"""Largest difference of logits, relative to their spread, at which the lean pass is the same model: rounding gives
about 1e-5 (1e-3 if weights are rounded to fp16), another structure more than 1."""
ROUNDED_TOLERANCE = 0.7
"""Root mean square of the difference, relative to the spread, at which rounded weights are still this model's: 4 bits
give about 0.3, logits that have nothing to do with each other more than 1."""

HALF_A_STEP = 1.01 / 254
"""Of 8 bits, relative to the largest number; with room for the arithmetic's own rounding."""

Take = Callable[[list[Any]], Product]
"""One product in place of several linear modules that share their input."""


class NotLeanError(Exception):
    """The model is built differently; the message says how."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's products, norm weights and attention shape."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    heads: HeadsStruct
    rotates: bool
    sliding_window: int | None
    width: int
    """Of the MLP between its projections."""
    keep: tuple[torch.Tensor, ...]
    """Tensors whose addresses `heads` holds."""


@dataclass(frozen=True, slots=True)
class _LayerStack:
    """Layers in the form in which our kernels run all of them at once."""

    layers: Any
    product: int
    widest: int
    """Numbers a row needs side by side, the residual apart."""


class LeanRunner(Runner):
    """Runs the layers taken from a Transformers model, of which nothing else is kept.

    `model` has passed `refuse_other_structures`. `shape` is a runner of the same configuration; it needs no weights.
    With `seams` the model is a rank's share, and all ranks run theirs at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelRunner,
        kernels: Kernels,
        take: Take,
        take_head: Take,
        seams: Seams | None = None,
    ) -> None:
        self._kernels, self._seams = kernels.library, seams
        self._vocab_size, self._max_model_len = shape.vocab_size, shape.max_model_len
        self._geometry = replace(shape.kv_geometry(), device=torch.device("cpu"))
        body: Any = model.model
        self._cos, self._sin = rotary_tables(body, int(body.layers[0].self_attn.head_dim), shape.max_model_len)
        # The largest first, while nothing else is held.
        self._head = take_head([model.lm_head])
        with align_module_device(body.embed_tokens):
            tied = bool(getattr(model.config, "tie_word_embeddings", False))
            self._embedding = _table(body.embed_tokens.weight.detach(), self._head, tied=tied)
        self._final_norm, self._eps = _norm(body.norm)
        self._layers = [_take_layer(layer, take) for layer in body.layers]
        self._native_sum = None if seams is None else seams.group.native_sum
        by_python = seams is not None and self._native_sum is None
        self._stack = None if by_python else _layer_stack(self._layers)
        rotation = Rotation(body.rotary_emb.inv_freq.detach().float().clone())
        rotations = tuple(rotation if layer.rotates else None for layer in self._layers)
        self._key_shift = shift_refusal(model.config) or KeyShift(rotations)
        config = model.config
        self._embedding_scale = float(getattr(config, "embedding_multiplier", 1.0) or 1.0)
        self._residual_scale = float(getattr(config, "residual_multiplier", 1.0) or 1.0)
        self._logits_scale = 1.0 / float(getattr(config, "logits_scaling", 1.0) or 1.0)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def device(self) -> torch.device:
        return self._geometry.device

    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def key_shift(self) -> KeyShift | str:
        return self._key_shift

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        ids, positions, rows = self.flatten(windows)
        x = self._embed(ids)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        step = _Step(
            self._kernels, windows, self._cos[positions], self._sin[positions], self._eps, self._residual_scale
        )
        if self._stack is not None:
            h = step.run_stack(self._stack, x, self._final_norm, self._native_sum)
        else:
            h = self._layer_by_layer(step, x)
        logits = self._head(h[rows])
        if self._seams is not None:
            logits = self._seams.gather(logits)
        return logits * self._logits_scale if self._logits_scale != 1.0 else logits

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        if self._seams is None:
            return _rows(self._embedding, ids)
        return self._seams.embed(ids, lambda own: _rows(self._embedding, own))

    def _layer_by_layer(self, step: _Step, x: torch.Tensor) -> torch.Tensor:
        summed = (lambda y: y) if self._seams is None else self._seams.sum
        h = torch.empty_like(x)
        step.norm(x, None, self._layers[0].attention_norm, h)
        for n, layer in enumerate(self._layers):
            attended = step.attend(n, layer, layer.qkv(h))
            step.norm(x, summed(layer.out(attended)), layer.mlp_norm, h)
            gated = step.gate(layer.gate_up(h))
            following = self._layers[n + 1].attention_norm if n + 1 < len(self._layers) else self._final_norm
            step.norm(x, summed(layer.down(gated)), following, h)
        return h

    @torch.inference_mode()
    def run_products(self, rows: int) -> None:
        """A step's matrix products alone, over `rows` rows: the floor a step is measured against."""
        first = self._layers[0]
        h = torch.randn(rows, self._final_norm.numel())
        attended = torch.randn(rows, first.heads.heads * first.heads.dim)
        gated = torch.randn(rows, first.width)
        for layer in self._layers:
            layer.qkv(h)
            layer.out(attended)
            layer.gate_up(h)
            layer.down(gated)
        self._head(h)


class _Step:
    """One forward pass's windows, in the form the kernels take, and the calls on them."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        windows: Sequence[Window],
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        residual_scale: float,
    ) -> None:
        self._kernels, self._windows, self._cos, self._sin = kernels, windows, cos, sin
        self._eps, self._residual_scale = eps, residual_scale
        self._structs = (WindowStruct * len(windows))()
        self._rows = 0
        for struct, window in zip(self._structs, windows, strict=True):
            entry = window.entry
            struct.row, struct.start, struct.rows = self._rows, window.start, len(window.token_ids)
            struct.keys, struct.values, struct.room = entry.keys.data_ptr(), entry.values.data_ptr(), entry.room
            if entry.scales is not None:
                struct.key_scales, struct.value_scales = (each.data_ptr() for each in entry.scales)
            self._rows += struct.rows

    def run_stack(
        self, stack: _LayerStack, x: torch.Tensor, final_norm: torch.Tensor, native_sum: tuple[int, int] | None
    ) -> torch.Tensor:
        """All layers in one call; `x` is left changed. `native_sum` is `Group.native_sum`; raises EngineError if a sum
        is not joined by all ranks."""
        h = torch.empty_like(x)
        scratch = torch.empty(self._rows * (stack.widest + x.shape[1]))
        failed = self._kernels.run_layers(
            ctypes.addressof(stack.layers),
            len(stack.layers),
            stack.product,
            final_norm.data_ptr(),
            self._eps,
            self._residual_scale,
            x.data_ptr(),
            h.data_ptr(),
            self._rows,
            x.shape[1],
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            ctypes.addressof(self._structs),
            len(self._windows),
            scratch.data_ptr(),
            *(native_sum or (None, None)),
        )
        if failed:
            raise EngineError("the ranks of a replica lost each other: one did not come to a sum in time")
        return h

    def norm(self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor) -> None:
        """x += y; out = RMS norm of x."""
        self._kernels.add_rms_norm(
            x.data_ptr(),
            None if y is None else y.data_ptr(),
            self._residual_scale,
            weight.data_ptr(),
            self._eps,
            out.data_ptr(),
            self._rows,
            x.shape[1],
        )

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self._rows, gate_up.shape[1] // 2)
        self._kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), self._rows, out.shape[1])
        return out

    def attend(self, number: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        heads = layer.heads
        out = torch.empty(self._rows, heads.heads * heads.dim)
        self._kernels.attention(
            qkv.data_ptr(),
            self._cos.data_ptr() if layer.rotates else None,
            self._sin.data_ptr() if layer.rotates else None,
            ctypes.addressof(self._structs),
            len(self._windows),
            number,
            ctypes.addressof(heads),
            out.data_ptr(),
        )
        return out


def _layer_stack(layers: Sequence[Layer]) -> _LayerStack | None:
    """None if a product is not one of ours."""
    structs = (LayerStruct * len(layers))()
    widest, product = 0, 0
    for struct, layer in zip(structs, layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            weight = getattr(layer, name)
            if not isinstance(weight, PackedWeight):
                return None
            setattr(struct, name, weight.address)
            product = weight.kernels.product_address
        struct.attention_norm, struct.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
        struct.heads = ctypes.addressof(layer.heads)
        struct.rotates, struct.width = layer.rotates, layer.width
        heads = layer.heads
        widest = max(widest, 2 * (heads.heads + heads.kv_heads) * heads.dim, 3 * layer.width)
    return _LayerStack(structs, product, widest)


def lean_runner(
    model: PreTrainedModel,
    kernels: Kernels,
    pack: Pack,
    pack_head: Pack | None = None,
    *,
    rounds: bool = False,
    seams: Seams | None = None,
) -> LeanRunner:
    """The lean form of a model, after it has reproduced the model's own logits on a probe.

    `pack_head` is for the output head, where that is packed otherwise. With `rounds`, both may change weights: then it
    is a lean pass that reads each weight anew that has to reproduce them, and the packed one has to resemble them.
    Raises NotLeanError, with the reason, if the model is built differently, which is known before any weight is needed,
    or if the logits differ. The model is left as it was. With `seams` it is a rank's share, joined with the others by
    them (`join_ranks`): all ranks make theirs at once, and see the same logits.
    """
    shape = refuse_other_structures(model)
    own = _own_logits(model)
    if rounds:
        _require_same(own, _probe(LeanRunner(model, shape, kernels, _read_anew, _read_anew, seams)))
    pack_head = pack_head or pack
    lean = LeanRunner(
        model,
        shape,
        kernels,
        take=lambda linears: pack(*_fused(linears)),
        take_head=lambda linears: pack_head(*_fused(linears)),
        seams=seams,
    )
    found = _probe(lean)
    if not rounds:
        _require_same(own, found)
    elif not (away := float((own - found).square().mean().sqrt() / own.std())) < ROUNDED_TOLERANCE:
        raise NotLeanError(f"with its weights rounded its logits differ by {away:.1f} of their spread")
    return lean


def _require_same(own: torch.Tensor, found: torch.Tensor) -> None:
    difference = float((own - found).abs().max() / own.std())
    if not difference < PROBE_TOLERANCE:
        raise NotLeanError(f"its logits differ by {difference:.1e} of their spread")


def _read_anew(linears: list[Any]) -> Product:
    """A product that holds no weights between two calls."""
    return lambda x: F.linear(x, *_fused(linears))


def refuse_other_structures(model: PreTrainedModel) -> ModelRunner:
    """Raise NotLeanError, with the reason, if the modules are not Llama's. Weights may be on the meta device.

    Returns a runner on the meta device, which knows the shape of everything.
    """
    try:
        body = _part(model, "model")
        for layer in body.layers:
            _check_layer(layer)
        _check_linears(model.lm_head)
        _check_norms(_part(body, "norm"))
        rotary_tables(body, int(body.layers[0].self_attn.head_dim), 1)
        return _shape(model.config)
    except AttributeError as error:
        raise NotLeanError(f"its modules are arranged differently ({error})") from None


def _shape(config: PretrainedConfig) -> ModelRunner:
    """The model without weights, behind our attention: what it brings to the cache and how it attends are checked."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=ATTENTION_NAME
        )
    try:
        return ModelRunner(model.eval())
    except ModelError as error:
        raise NotLeanError(error.message) from None
    except Exception as error:
        raise NotLeanError(f"without weights it does not run ({' '.join(str(error).split())[:100]})") from None


def _probe_ids(vocab_size: int) -> list[int]:
    found: list[int] = torch.randint(vocab_size, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return found


@torch.inference_mode()
def _own_logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([_probe_ids(text_config(model).vocab_size)])
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def _probe(runner: Runner) -> torch.Tensor:
    """Logits of a prefill, a decode step and a verification window over fixed pseudo-random tokens."""
    ids = _probe_ids(runner.vocab_size)
    kv = SlabKVCache(runner.kv_geometry(), PROBE_TOKENS, min(PROBE_TOKENS, runner.max_model_len))
    entry = kv.reserve(ids, len(ids))
    assert entry is not None
    logits = []
    for start, end in ((0, 18), (18, 19), (19, PROBE_TOKENS)):
        chunk = ids[start:end]
        logits.append(runner.run([Window(entry, chunk, sample=len(chunk))]))
        kv.append(entry, chunk)
    return torch.cat(logits)


def _check_layer(layer: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
        if hasattr(layer, name):
            raise NotLeanError(f"its layers have a {name}")
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise NotLeanError(f"its MLP uses {type(mlp.act_fn).__name__}")
    if hasattr(attention, "q_norm"):
        _check_norms(attention.q_norm, attention.k_norm)
        if attention.q_norm.weight.numel() != attention.head_dim:
            raise NotLeanError("its query norm spans several heads")
    _check_norms(layer.input_layernorm, layer.post_attention_layernorm)
    _check_linears(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    _check_linears(mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def layer_groups(layer: Any) -> tuple[list[Any], ...]:
    """A layer's products, by those that share their input."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )


def _take_layer(layer: Any, take: Take) -> Layer:
    attention = layer.self_attn
    norms = [_norm(attention.q_norm), _norm(attention.k_norm)] if hasattr(attention, "q_norm") else []
    heads = _heads(attention, norms)
    qkv, out, gate_up, down = map(take, layer_groups(layer))
    return Layer(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        attention_norm=_norm(layer.input_layernorm)[0],
        mlp_norm=_norm(layer.post_attention_layernorm)[0],
        heads=heads,
        rotates=bool(getattr(attention, "use_rope", True)),
        sliding_window=heads.sliding_window or None,
        width=layer.mlp.gate_proj.out_features,
        keep=tuple(weight for weight, _ in norms),
    )


def _heads(attention: Any, norms: list[tuple[torch.Tensor, float]]) -> HeadsStruct:
    dim = int(attention.head_dim)
    return HeadsStruct(
        heads=attention.q_proj.out_features // dim,
        kv_heads=attention.k_proj.out_features // dim,
        dim=dim,
        rotary_dim=dim,
        scale=float(attention.scaling),
        norm_eps=norms[0][1] if norms else 0.0,
        q_norm=norms[0][0].data_ptr() if norms else None,
        k_norm=norms[1][0].data_ptr() if norms else None,
        sliding_window=layer_window(attention) or 0,
    )


def layer_window(attention: Any) -> int | None:
    """The layer's own, else the whole model's."""
    if hasattr(attention, "sliding_window"):
        found: int | None = attention.sliding_window
        return found
    return getattr(attention.config, "sliding_window", None)


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    with align_module_device(module):
        return module.weight.detach().float().clone(), float(module.variance_epsilon)


def _check_norms(*modules: Any) -> None:
    for module in modules:
        if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            raise NotLeanError(f"it has a {type(module).__name__}")


def _check_linears(*modules: Any) -> None:
    for module in modules:
        if not isinstance(module, nn.Linear):
            raise NotLeanError(f"it has a {type(module).__name__} where a Linear is expected")


def _fused(linears: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias, float32, of several products that share their input."""
    read = [_read(linear) for linear in linears]
    if len(read) == 1:
        return read[0]
    weight = torch.cat([weight for weight, _ in read])
    if all(bias is None for _, bias in read):
        return weight, None
    return weight, torch.cat([torch.zeros(len(part)) if bias is None else bias for part, bias in read])


def _read(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    with align_module_device(linear):
        return linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float()


def _table(embedding: torch.Tensor, head: Product, *, tied: bool) -> torch.Tensor | PackedWeight:
    """What rows are looked up in: the packed head, if it has every number of the embedding, or is the same weight,
    rounded to 8 bits. A checkpoint that calls the two tied may still hold one for each."""
    if isinstance(head, PackedWeight) and (head.outputs, head.inputs) == tuple(embedding.shape):
        slack = HALF_A_STEP if tied else 0.0
        pieces = zip(torch.split(torch.arange(head.outputs), 1024), torch.split(embedding, 1024), strict=True)
        if all(_within(slack, head.rows(ids), rows) for ids, rows in pieces):
            return head
    return _narrowed(embedding)


def _within(slack: float, found: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether no number is away from its own by more than this share of its row's largest."""
    return bool(((found - rows).abs() <= slack * rows.abs().amax(1, keepdim=True)).all())


def _rows(table: torch.Tensor | PackedWeight, ids: torch.Tensor) -> torch.Tensor:
    return table.rows(ids) if isinstance(table, PackedWeight) else F.embedding(ids, table).float()


def _narrowed(table: torch.Tensor) -> torch.Tensor:
    """A copy in the narrowest type that holds every number of it exactly: rows are looked up, not multiplied."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(rows.to(dtype).float(), rows) for rows in torch.split(table, 1024)):
            return table.to(dtype)
    return table.clone()


def rotary_tables(body: Any, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, [length, rotary_dim / 2], from the model's own rotary module."""
    rotary = body.rotary_emb
    if "dynamic" in getattr(rotary, "rope_type", "") or "longrope" in getattr(rotary, "rope_type", ""):
        raise NotLeanError(f"its {rotary.rope_type} rotary embedding depends on the length")
    cos, sin = rotary(torch.zeros(1, 1), position_ids=torch.arange(length)[None])
    if cos.shape[-1] != head_dim:
        raise NotLeanError("it rotates only a part of each head")
    half = head_dim // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _part(module: Any, name: str) -> Any:
    part = getattr(module, name, None)
    if part is None:
        raise NotLeanError(f"{type(module).__name__} has no {name}")
    return part
