"""Models built like Llama, on a GPU: their weights fused, five launches a layer where a step has few rows.

A model is taken apart by its modules, as `paceline.engine.lean` does on a CPU. The modules stay and share the fused
weights, so that nothing is held twice and the model's own code still runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from paceline.engine.attention import Scoring
from paceline.engine.gpu import kernels
from paceline.engine.gpu.attention import Heads, PagedAttention, Scratch, launches_overlap
from paceline.engine.gpu.body import Body
from paceline.engine.gpu.inputs import Batch
from paceline.engine.gpu.linear import Linears, Weight
from paceline.engine.gpu.sums import Sums, sums_for
from paceline.engine.lean import NotLeanError, layer_groups, layer_window, refuse_other_structures, rotary_tables
from paceline.engine.runner import ModelRunner
from paceline.engine.tp.group import Group


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `heads` turn and norm what they attend with; `plain` find that done."""

    qkv: Weight
    out: Weight
    gate_up: Weight
    down: Weight
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    heads: Heads
    scoring: Scoring

    @property
    def plain(self) -> Heads:
        return replace(self.heads, cos=None, sin=None, q_norm=None, k_norm=None)


class FusedBody(Body):
    """The layers of a Transformers model, which shares their weights from now on."""

    def __init__(
        self,
        model: PreTrainedModel,
        attention: PagedAttention,
        *,
        in_bytes: bool = False,
        group: Group | None = None,
    ) -> None:
        """With `in_bytes` weights are rounded to 8 bits, and the model keeps none. With a `group` the model is a
        rank's share. Raises NotLeanError, with the reason, if the model is built differently, before anything is
        changed."""
        self.shape: ModelRunner = refuse_other_structures(model)
        body: Any = model.model
        _refuse_other_weights(model)
        config = model.config
        self._attention = attention
        # Of 8-bit weights there is too little to read for it to pay: 4.7 ms in place of 4.5 (8B, H100).
        attention.overlaps = launches_overlap(model.device) and not in_bytes
        scratch = Scratch(model.device)
        self._linears = Linears(float(body.norm.variance_epsilon), scratch, overlaps=attention.overlaps)
        cos, sin = rotary_tables(body, int(body.layers[0].self_attn.head_dim), self.shape.max_model_len)
        self._turns = cos.to(model.device), sin.to(model.device)
        self._embedding_parameter = body.embed_tokens.weight
        self._embedding = body.embed_tokens.weight.detach()
        self._in_bytes = in_bytes
        self._head = self._weight([model.lm_head])
        self._final_norm = body.norm.weight.detach()
        self._layers = [self._taken(layer) for layer in body.layers]
        self._embedding_scale = float(getattr(config, "embedding_multiplier", 1.0) or 1.0)
        self._residual_scale = float(getattr(config, "residual_multiplier", 1.0) or 1.0)
        self._logits_scale = 1.0 / float(getattr(config, "logits_scaling", 1.0) or 1.0)
        self._sums: Sums | None = None
        if group is not None:
            layers, outputs = len(self._layers), self._head.outputs
            self._sums = sums_for(group, outputs, layers, self._embedding, overlaps=attention.overlaps)

    @property
    def weight_bytes(self) -> int:
        products = [self._head, *(each for one in self._layers for each in (one.qkv, one.out, one.gate_up, one.down))]
        return sum(each.data.nbytes for each in products)

    @torch.inference_mode()
    def logits(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        x = self._embedded(batch.ids)
        for number, layer in enumerate(self._layers):
            qkv = self._linears.normed(x, layer.attention_norm, layer.qkv)
            attended = self._attended(batch, number, layer, qkv)
            x = self._added(x, attended, layer.out)
            gated = self._linears.gated(x, layer.mlp_norm, layer.gate_up)
            x = self._added(x, gated, layer.down)
        if batch.sampled is not None:
            x = x[batch.sampled]
        if out is None:
            out = torch.empty((x.shape[0], self.shape.vocab_size), dtype=torch.float32, device=x.device)
        if self._sums is None:
            self._linears.normed(x, self._final_norm, self._head, out)
        else:
            part = torch.empty((x.shape[0], self._head.outputs), dtype=torch.float32, device=x.device)
            self._linears.normed(x, self._final_norm, self._head, part)
            self._sums.logits(part, out)
        return out if self._logits_scale == 1.0 else out.mul_(self._logits_scale)

    def place_for_logits(self, rows: int) -> torch.Tensor | None:
        return None if self._sums is None else self._sums.place(rows)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        if self._sums is None:
            x = F.embedding(ids, self._embedding)
        else:
            self._sums.begin()
            x = self._sums.embedded(ids, self._embedding)
        return x if self._embedding_scale == 1.0 else x.mul_(self._embedding_scale)

    def _added(self, x: torch.Tensor, y: torch.Tensor, weight: Weight) -> torch.Tensor:
        """What a product gives of all ranks, added to the residual."""
        if self._sums is None:
            return self._linears.added(x, y, weight, self._residual_scale)
        return self._sums.added(self._linears, x, y, weight, self._residual_scale)

    def _attended(self, batch: Batch, number: int, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        heads = layer.heads
        whole = qkv.view(qkv.shape[0], -1, heads.dim)
        q, k, v = torch.split(whole, [heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
        if not self._attention.turns(batch.longest):
            self._turn(batch, heads, qkv)
            heads = layer.plain
        return self._attention.attend(batch, number, heads, layer.scoring, q, k, v)

    def _turn(self, batch: Batch, heads: Heads, qkv: torch.Tensor) -> None:
        """What our attention kernel does on the way, for others."""
        for first, count, norm in ((0, heads.heads, heads.q_norm), (heads.heads, heads.kv_heads, heads.k_norm)):
            if heads.cos is None and norm is None:
                continue
            kernels.rotate_rows[(qkv.shape[0], count)](
                qkv, qkv.stride(0), batch.positions, heads.cos, heads.sin, norm, heads.norm_eps, first,
                DIM=heads.dim, HALF=heads.half, ROTATES=heads.cos is not None, NORMED=norm is not None, num_warps=1,
            )  # fmt: skip

    def _weight(self, linears: list[Any]) -> Weight:
        fused = _fused(linears)
        if not self._in_bytes:
            return fused
        rounded = fused.rounded()
        for linear in linears:
            if linear.weight is not self._embedding_parameter:
                linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        return rounded

    def _taken(self, layer: Any) -> Layer:
        attention = layer.self_attn
        qkv, out, gate_up, down = map(self._weight, layer_groups(layer))
        normed = hasattr(attention, "q_norm")
        turns = self._turns if getattr(attention, "use_rope", True) else (None, None)
        dim = int(attention.head_dim)
        heads = Heads(
            attention.q_proj.out_features // dim,
            attention.k_proj.out_features // dim,
            dim,
            cos=turns[0],
            sin=turns[1],
            q_norm=attention.q_norm.weight.detach() if normed else None,
            k_norm=attention.k_norm.weight.detach() if normed else None,
            norm_eps=float(attention.q_norm.variance_epsilon) if normed else 0.0,
        )
        return Layer(
            qkv,
            out,
            gate_up,
            down,
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            heads,
            Scoring(float(attention.scaling), layer_window(attention)),
        )


def _refuse_other_weights(model: Any) -> None:
    """Quantized linear layers look like Linear and are none; products of float32 are for other hardware."""
    linears = [linear for layer in model.model.layers for group in layer_groups(layer) for linear in group]
    for linear in (*linears, model.lm_head):
        if type(linear) is not nn.Linear or linear.weight.dtype not in (torch.bfloat16, torch.float16):
            raise NotLeanError(f"its products are {type(linear).__name__} of {linear.weight.dtype}")
    devices = {weight.device for weight in model.parameters()}
    if len(devices) != 1:
        raise NotLeanError(f"its weights are on {len(devices)} devices")


def _fused(linears: list[Any]) -> Weight:
    """The weights of products that share their input, one above the other; the modules keep views of them."""
    if len(linears) == 1:
        return Weight(linears[0].weight.detach(), _bias(linears[0]))
    weight = torch.cat([linear.weight.detach() for linear in linears])
    parts = torch.split(weight, [linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    biases = [_bias(linear) for linear in linears]
    if all(bias is None for bias in biases):
        return Weight(weight)
    filled = [
        weight.new_zeros(linear.out_features) if b is None else b for linear, b in zip(linears, biases, strict=True)
    ]
    return Weight(weight, torch.cat(filled))


def _bias(linear: Any) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach()
