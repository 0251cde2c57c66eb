"""What a model takes of memory, by arithmetic: from its shape and a precision to bytes, and to sessions that fit.

Nothing here loads or imports a model. `paceline.engine.shape` reads a ModelShape from a configuration.

    peak while it runs    weights + KV cache + activations of one step + working copies + libraries
    peak while it loads   weights + what is read or rounded at a time
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from paceline.models.precisions import FLOAT32, GROUP, MATRIX, Precision

GIB = 2**30
KV_SCALE = 4
"""Bytes of the scale beside each int8 key, and each value, of a head."""
PROCESS = {"cuda": 512 << 20, "cpu": 400 << 20}
"""What a process takes before it holds a model, on the device it runs on: a CUDA context with its kernels; Python,
PyTorch, Transformers and a tokenizer."""
LIBRARIES = {"cuda": 64 << 20, "cpu": 0}
"""Workspace of cuBLAS and cuBLASLt on an H100, of 32 MiB each; elsewhere less."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """`count` linear layers alike: weights [outputs, inputs], and biases [outputs] or none.

    `packs` and `quantizes` say whether our CPU kernels and libraries take them: both go by a module's class.
    """

    outputs: int
    inputs: int
    count: int = 1
    bias: bool = False
    packs: bool = True
    quantizes: bool = True

    @property
    def numbers(self) -> int:
        """Of one weight."""
        return self.outputs * self.inputs

    @property
    def biases(self) -> int:
        """Numbers of all of them."""
        return self.count * self.outputs if self.bias else 0

    @property
    def parameters(self) -> int:
        return self.count * self.numbers + self.biases


@dataclass(frozen=True, slots=True)
class KVShape:
    """One token's keys and values, in every layer: `kv_heads` of `head_dim`, which `heads` of queries share.

    `sliding_layers` see the last `window` tokens only. The KV cache keeps all of theirs too.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    sliding_layers: int = 0

    @property
    def sharing(self) -> str:
        """MHA, GQA (2305.13245) or MQA (1911.02150)."""
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    def bytes_per_token(self, itemsize: int, *, int8: bool = False) -> int:
        """Stored in numbers of `itemsize` bytes, or in int8 with a scale for each key and value of a head."""
        head = self.head_dim + KV_SCALE if int8 else self.head_dim * itemsize
        return 2 * self.layers * self.kv_heads * head


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's numbers by where they are. Tied weights count once.

    `matrices` are its linear layers but for the `head`, which gives the logits and has no weights of its own if it is
    `tied` to the `embedding`. `experts` are the weights of mixtures of experts, kept together and no linear layers;
    `others` are norms, learned positions and the like. `buffers` are bytes: each has a type of its own.
    `width` is of the widest activations inside a layer, `scores_kept` whether its attention holds every score, since
    no fused kernel computes it. `lean` models run with fused products on a CPU, and are never in memory whole. Their
    embedding takes `itemsize` bytes a number, or none where it is tied to a packed head. `quantized` is the method
    a checkpoint is quantized by, "" if it is not.
    """

    family: str
    parameters: int
    matrices: tuple[Matrix, ...]
    head: Matrix
    tied: bool
    embedding: int
    experts: int
    buffers: int
    hidden: int
    width: int
    kv: KVShape
    max_model_len: int
    lean: bool = False
    itemsize: int = FLOAT32
    quantized: str = ""
    scores_kept: bool = False

    @property
    def vocab_size(self) -> int:
        return self.head.outputs

    @property
    def others(self) -> int:
        own = 0 if self.tied else self.head.parameters
        linear = sum(matrix.parameters for matrix in self.matrices)
        return self.parameters - linear - own - self.embedding - self.experts

    @property
    def largest(self) -> int:
        """Numbers of the largest linear layer that is not the head."""
        return max((matrix.numbers for matrix in self.matrices), default=0)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass works on: `rows` tokens, of which `sampled` get logits, and the longest text in it."""

    rows: int
    sampled: int
    context: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device that runs the model, the process itself apart.

    `working` is what a product keeps beside its weight while it runs: dequantized copies, integer sums. `loading` is
    the most at any moment of the load, weights included.
    """

    weights: int
    kv: int
    activations: int
    working: int
    libraries: int
    loading: int

    @property
    def running(self) -> int:
        return self.weights + self.kv + self.activations + self.working + self.libraries

    @property
    def peak(self) -> int:
        return max(self.running, self.loading)


def footprint(shape: ModelShape, precision: Precision, step: Step, kv_tokens: int, *, kv_int8: bool) -> Footprint:
    """A model that holds keys and values of `kv_tokens` tokens and runs steps like `step`."""
    return Footprint(
        weights=weight_bytes(shape, precision),
        kv=kv_tokens * shape.kv.bytes_per_token(precision.activation, int8=kv_int8),
        activations=activation_bytes(shape, precision, step, kv_int8=kv_int8),
        working=working_bytes(shape, precision, step),
        libraries=LIBRARIES[precision.device],
        loading=loading_bytes(shape, precision),
    )


def weight_bytes(shape: ModelShape, precision: Precision) -> int:
    """Parameters and buffers.

    Libraries take the linear layers but not the head; all else has the precision's plain type, and a tied head is the
    embedding. On a CPU we pack every linear layer, the head too, beside its embedding; the lean pass keeps the
    embedding in 16 bits where these have all of it, or in a tied head of 8 bits alone, and tables of rotary angles.
    """
    linear = sum(matrix.count * _stored(matrix, precision) for matrix in shape.matrices)
    biases = sum(matrix.biases for matrix in shape.matrices)
    inner = linear + (biases + shape.experts + shape.others) * precision.plain + shape.buffers
    head = _stored_head(shape, precision) + shape.head.biases * precision.plain
    if _runs_lean(shape, precision):
        tables = shape.max_model_len * shape.kv.head_dim * FLOAT32
        shared = shape.tied and precision.shares_head and shape.head.inputs % GROUP == 0
        return inner + tables + head + (0 if shared else shape.embedding * shape.itemsize)
    shared = shape.tied and precision.head == "plain"
    return inner + shape.embedding * precision.plain + (0 if shared else head)


def activation_bytes(shape: ModelShape, precision: Precision, step: Step, *, kv_int8: bool = False) -> int:
    """Of one step, where it is largest: inside a layer, or at the logits. With s bytes a number, n rows:

        layer    n s (4 hidden + 2 head_dim + max(3 (heads + 2 kv_heads) head_dim, 3 width)) + scores + read
        logits   n s 4 hidden + sampled vocab (s + 8)

    Residuals, normed rows and rotary angles; beside them queries, keys and values with the copies that norms of heads
    and rotary positions make, or gate, up and their product. Fused attention keeps no scores; elsewhere they are
    n context heads (s + 8). An int8 KV cache is read layer by layer into 2 context kv_heads head_dim s. Logits come in
    the model's type, are made float32, and sampling takes as much again.
    """
    s, kv = precision.activation, shape.kv
    projections = 3 * (kv.heads + 2 * kv.kv_heads) * kv.head_dim
    layer = step.rows * s * (4 * shape.hidden + 2 * kv.head_dim + max(projections, 3 * shape.width))
    if shape.scores_kept:
        layer += step.rows * step.context * kv.heads * (s + 2 * FLOAT32)
    if kv_int8:
        layer += 2 * step.context * kv.kv_heads * kv.head_dim * s
    logits = step.rows * s * 4 * shape.hidden + step.sampled * shape.vocab_size * (s + 2 * FLOAT32)
    return max(layer, logits)


def working_bytes(shape: ModelShape, precision: Precision, step: Step) -> int:
    """What the precision's products keep at a time: copies of the largest weight, sums of the widest output."""
    widest = max((matrix.outputs for matrix in shape.matrices), default=0)
    return shape.largest * precision.copies + step.rows * widest * precision.sums


def loading_bytes(shape: ModelShape, precision: Precision) -> int:
    """Most at any moment of the load.

    On a GPU weights are written in place, or rounded one at a time from 16 bits. On a CPU the lean pass reads one
    product at a time in float32, the head first, and joins those that share their input; any other model is loaded
    whole in float32 and packed weight by weight, for a library all before the first of them is dropped.
    """
    weights = weight_bytes(shape, precision)
    if precision.device == "cuda":
        return weights + (0 if precision.is_plain else shape.largest * precision.plain)
    if precision.of_library:
        return weights + shape.parameters * FLOAT32
    head = _stored_head(shape, precision)
    if _runs_lean(shape, precision):
        return max(weights + 4 * FLOAT32 * shape.largest, FLOAT32 * shape.head.numbers + head)
    return max(weights, shape.parameters * FLOAT32 + shape.buffers + head)


def _stored(matrix: Matrix, precision: Precision) -> int:
    """Bytes of one weight of these; plain numbers where neither library takes it."""
    taken = matrix.quantizes if precision.device == "cuda" or precision.of_library else matrix.packs
    form = precision.matrix if taken else "plain"
    return MATRIX[form](matrix.outputs, matrix.inputs, precision.plain)


def _stored_head(shape: ModelShape, precision: Precision) -> int:
    """Bytes of the head's weight, if it has one of its own."""
    return MATRIX[precision.head](shape.head.outputs, shape.head.inputs, precision.plain)


def _runs_lean(shape: ModelShape, precision: Precision) -> bool:
    return shape.lean and precision.device == "cpu" and not precision.of_library


@dataclass(frozen=True, slots=True)
class Load:
    """What a server is to hold: sessions of `context` tokens, steps of `rows` tokens with `sampled` logits."""

    context: int
    rows: int
    sampled: int
    kv_int8: bool = False

    @property
    def step(self) -> Step:
        return Step(min(self.rows, self.context), self.sampled, self.context)


@dataclass(frozen=True, slots=True)
class Fit:
    """How many sessions of `context` tokens fit beside all else, and how many tokens of KV in all."""

    context: int
    sessions: int
    kv_tokens: int


def together(parts: Iterable[Footprint]) -> Footprint:
    """A target and its draft in one process. They run, and are loaded, in turns: what that takes is taken once."""
    parts = tuple(parts)
    weights = sum(part.weights for part in parts)
    return Footprint(
        weights=weights,
        kv=sum(part.kv for part in parts),
        activations=max(part.activations for part in parts),
        working=max(part.working for part in parts),
        libraries=max(part.libraries for part in parts),
        loading=weights + max(part.loading - part.weights for part in parts),
    )


def fit(models: Iterable[ModelShape], precision: Precision, load: Load, memory: int) -> Fit:
    """Sessions of `load.context` tokens in `memory` bytes, KV of a target and of its draft together.

    None (0) where the models alone take more, running or while they are loaded.
    """
    models = tuple(models)
    fixed = together(footprint(model, precision, load.step, 0, kv_int8=load.kv_int8) for model in models)
    token = sum(model.kv.bytes_per_token(precision.activation, int8=load.kv_int8) for model in models)
    free = memory - PROCESS[precision.device]
    room = max(0, free - fixed.running) if fixed.loading <= free else 0
    return Fit(load.context, room // (token * load.context), room // token)
