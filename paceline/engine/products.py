"""Linear layers on a CPU: the ways to compute a product, what each keeps of the weights, and which one is taken.

A decode step reads every weight once, so its floor is bytes over bandwidth. Fewer bytes are free only where they are
the same weights: a checkpoint's output is fixed by its seed on every host, so a race between backends is run only
among those that `keep` its weights, and in all of them activations have 16 bits or more. Whoever names a backend, or a
type of weights, has the weights rounded to what it stores, and whoever asks for 8 bits of activations gets them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from paceline.engine.packed import GROUP, Activations, linear_kernels, packed

Product = Callable[[torch.Tensor], torch.Tensor]
"""x -> x W^T + b, float32 [..., in] to [..., out]."""
Pack = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""Weight [out, in] and bias [out], float32, to their product. The weight is the pack's to keep or to drop."""
B = TypeVar("B", bound="LinearBackend")
Times = Mapping[int, float]
"""Seconds of a product, by rows."""

FP16_NORMAL, FP16_MAX = 2.0**-14, 65504.0
REQUEST = {1: 64, 6: 64, 64: 8}
"""How often a product of so many rows is computed for the request backends race on: 64 plain steps, 64 windows of six
to verify, a prompt of 512 tokens (64 at a time: by then the time is arithmetic and grows with the rows)."""
REPEATS, SECONDS = 3, 0.05
"""A time is the least of so many, or of as many as fit."""
LARGER_THAN_CACHES = 64 << 20
COARSE: tuple[Activations, ...] = ("int8", "bf16")
"""Activations that show in the logits."""


class LinearBackend(ABC):
    """One way to compute y = x W^T + b."""

    name: ClassVar[str]

    @abstractmethod
    def missing(self) -> str | None:
        """Why it does not run here; None if it does."""

    @abstractmethod
    def round(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        """The product with the weights rounded to what this backend stores, or None if it has no place for them."""


class KeepingBackend(LinearBackend):
    """One that changes no weight it keeps and leaves activations as many bits as it was made for: it may race.

    `rows_alike` says whether a row's product is the same to the last bit whatever rows it is computed with.
    """

    rows_alike: ClassVar[bool] = True

    @abstractmethod
    def keep(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        """The product with exactly these weights, or None if this backend would change them."""


class Torch(KeepingBackend):
    """float32 weights, by PyTorch's own product, which sums in another order for a few rows than for many."""

    name = "torch"
    rows_alike = False

    def missing(self) -> str | None:
        return None

    def keep(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return torch_product(weight, bias)

    round = keep


class Fbgemm(KeepingBackend):
    """fp16 weights, float32 sums: half the bytes, and a few rows cost what one row costs.

    Below fp16's smallest normal number, 6e-5, bfloat16 goes on and fp16 has steps of 6e-8: weights there may move by
    half of that. Anything larger must be exact.
    """

    name = "fbgemm_fp16"

    def missing(self) -> str | None:
        found = "fbgemm" in torch.backends.quantized.supported_engines
        return None if found else "this torch has no FBGEMM, or the CPU no AVX2"

    def keep(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        exact = all(_same_in_fp16(rows) for rows in (weight[:16], *torch.split(weight, 1024)))
        return fp16_product(weight, bias) if exact else None

    def round(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        low, high = weight.aminmax()
        return fp16_product(weight, bias) if bool((-low <= FP16_MAX) & (high <= FP16_MAX)) else None


class Packed(KeepingBackend):
    """Weights on a grid of 4 or 8 bits in each group of 32 inputs, by our own kernels; rounded, a grid in each group of
    `group_size`, a multiple of 32."""

    bits: ClassVar[int]

    def __init__(self, activations: Activations = "int16", group_size: int = GROUP) -> None:
        self.activations, self.group_size = activations, group_size

    def missing(self) -> str | None:
        found = linear_kernels()
        return found if isinstance(found, str) else None

    def keep(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        return self._packed(weight, bias, None)

    def round(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
        return self._packed(weight, bias, self.group_size)

    def _packed(self, weight: torch.Tensor, bias: torch.Tensor | None, round_group: int | None) -> Product | None:
        kernels = linear_kernels()
        if isinstance(kernels, str):
            return None
        return packed(kernels, weight, bias, self.bits, self.activations, round_group=round_group)


class Int8(Packed):
    name = "int8"
    bits = 8


class Int4(Packed):
    name = "int4"
    bits = 4


class Bf16(LinearBackend):
    """bfloat16 weights and activations, by oneDNN: 8 bits of each activation."""

    name = "bf16"

    def missing(self) -> str | None:
        # oneDNN also runs bfloat16 without these instructions, slower than float32.
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if torch._C._has_mkldnn and supported:
            return None
        return "the CPU multiplies no bfloat16, or this torch has no oneDNN"

    def round(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        tiled = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), 1)
        linear = torch.ops.mkldnn._linear_pointwise

        def product(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = linear(x.bfloat16(), tiled, None, "none", [], "").float()
            return y if bias is None else y + bias

        return product


KEEPING: tuple[KeepingBackend, ...] = (Torch(), Fbgemm(), Int8(), Int4())
BACKENDS: tuple[LinearBackend, ...] = (*KEEPING, Bf16())


def with_activations(backend: B, activations: Activations, group_size: int = GROUP) -> B:
    """The same backend with such activations and groups, if it is one to have a choice of them."""
    return type(backend)(activations, group_size) if isinstance(backend, Packed) else backend


def torch_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """In float32, by PyTorch's own product."""
    return lambda x: F.linear(x, weight, bias)


def fp16_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Over a packed copy of W in FBGEMM's own tiling; the original is free to go."""
    tiled = torch.ops.quantized.linear_prepack_fp16(
        weight.detach().clone(), None if bias is None else bias.detach().clone()
    )
    linear = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: linear(x, tiled)


def _same_in_fp16(weight: torch.Tensor) -> bool:
    half = weight.half().float()
    return bool(((half == weight) | (weight.abs() < FP16_NORMAL)).all())


@dataclass(frozen=True, slots=True)
class LinearBackends:
    """What runs here: `keeping` race for each weight they keep. `rounding`, if named, takes every weight it can; of the
    output head `head` takes what it cannot keep, if that is named, too.

    Those without `rows_alike` are taken only where no other keeps a weight: else the last bit of a logit would depend
    on how a sequence is cut into steps, and with it, where two tokens nearly tie, the token.
    """

    keeping: tuple[KeepingBackend, ...]
    rounding: LinearBackend | None = None
    head: LinearBackend | None = None


@dataclass(frozen=True, slots=True)
class _Won:
    """A race's winner, and what everyone took."""

    backend: KeepingBackend
    times: Mapping[str, Times]


class Packer:
    """Packs one model's weights, each by the backend that is fastest among those that keep it.

    Fastest over `REQUEST`, measured once for a shape: the winner takes further weights of that shape as long as it
    keeps them, without a look at the others. `measure` gives each product's Times.
    """

    def __init__(self, backends: LinearBackends, measure: Measure | None = None) -> None:
        self._backends, self._measure = backends, measure or measured
        self._times: dict[tuple[torch.Size, frozenset[str]], Mapping[str, Times]] = {}
        self._won: dict[torch.Size, _Won] = {}
        self._taken: list[tuple[str, Mapping[str, Times]]] = []

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return self._pack(weight, bias, self._backends.rounding)

    def head(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The output head's product."""
        rounding, finer = self._backends.rounding, self._backends.head
        keeps = isinstance(rounding, KeepingBackend) and rounding.keep(weight, bias) is not None
        return self._pack(weight, bias, rounding if keeps or finer is None else finer)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None, rounding: LinearBackend | None) -> Product:
        if rounding is not None and (product := rounding.round(weight, bias)) is not None:
            self._taken.append((rounding.name, {}))
            return product
        last = self._won.get(weight.shape)
        if last is not None and (product := last.backend.keep(weight, bias)) is not None:
            self._taken.append((last.backend.name, last.times))
            return product
        return self._race(weight, bias)

    def _race(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        kept = {
            backend.name: (backend, product)
            for backend in self._backends.keeping
            if (product := backend.keep(weight, bias)) is not None
        }
        alike = {name: one for name, one in kept.items() if one[0].rows_alike}
        kept = alike or kept
        if Int4.name in kept:
            kept.pop(Int8.name, None)  # the same integers in twice the bytes
        times = self._times_of(weight.shape, {name: product for name, (_, product) in kept.items()})
        name = min(kept, key=lambda name: request_time(times[name])) if times else next(iter(kept))
        backend, product = kept[name]
        if backend.rows_alike:
            self._won[weight.shape] = _Won(backend, times)
        self._taken.append((name, times))
        return product

    def _times_of(self, shape: torch.Size, kept: Mapping[str, Product]) -> Mapping[str, Times]:
        if len(kept) == 1:
            return {}
        key = (shape, frozenset(kept))
        if key not in self._times:
            self._times[key] = self._measure(kept, shape[1])
        return self._times[key]

    @property
    def rounds(self) -> bool:
        """Whether it may change weights, or activations, by more than fp16 does."""
        coarse = any(isinstance(each, Packed) and each.activations in COARSE for each in self._backends.keeping)
        return coarse or isinstance(self._backends.rounding, Packed | Bf16)

    @property
    def taken(self) -> str:
        """Which backends were taken, and for how many weights if they are several."""
        count = Counter(name for name, _ in self._taken)
        return ", ".join(count) if len(count) == 1 else ", ".join(f"{name} x{n}" for name, n in count.most_common())

    @property
    def reason(self) -> str:
        """Why, with the times measured."""
        if self._backends.rounding is not None:
            return "as configured"
        others = {name for taken, times in self._taken for name in times if name != taken}
        if not others:
            return "nothing smaller keeps the checkpoint's weights"
        rest = ", ".join(f"{name} {self._milliseconds(name)}" for name in sorted(others))
        return f"fastest that keeps the weights: on one thread 1/6 rows take {self._milliseconds('')} ms ({rest})"

    def _milliseconds(self, name: str) -> str:
        """Of 1 and 6 rows through every weight measured, by this backend where it keeps the weight."""
        used = [times.get(name, times[taken]) for taken, times in self._taken if times]
        return "/".join(f"{sum(times[rows] for times in used) * 1e3:.1f}" for rows in (1, 6))


def request_time(times: Times) -> float:
    """Seconds a product takes of the request that backends race on."""
    return sum(count * times[rows] for rows, count in REQUEST.items())


def measured(products: Mapping[str, Product], inputs: int) -> Mapping[str, Times]:
    """Least CPU seconds of each product on one thread, by the rows of REQUEST, with its weights in no cache.

    Replicas load side by side: threads that wait for each other, and time spent waiting for a core, would measure the
    neighbours. On one thread memory is less of a limit than on all, so a smaller form wins no race it should lose.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(products, inputs)
    finally:
        torch.set_num_threads(threads)


def _measured(products: Mapping[str, Product], inputs: int) -> Mapping[str, Times]:
    other = torch.zeros(LARGER_THAN_CACHES // 4)
    best = {name: dict.fromkeys(REQUEST, float("inf")) for name in products}
    for rows in REQUEST:
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        spent = 0.0
        for repeat in range(REPEATS + 1):
            for name, product in products.items():
                other.sum()
                begin = time.thread_time()
                product(x)
                took = time.thread_time() - begin
                spent += took
                if repeat > 0:  # the first is for what is set up at first use
                    best[name][rows] = min(best[name][rows], took)
            if repeat > 0 and spent > SECONDS * len(products):
                break
    return best


Measure = Callable[[Mapping[str, Product], int], Mapping[str, Times]]


class ProductLinear(nn.Module):
    """nn.Linear's place in a model that runs its own code."""

    def __init__(self, linear: nn.Linear, pack: Pack) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = pack(linear.weight.detach().float(), None if linear.bias is None else linear.bias.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def replace_linears(model: PreTrainedModel, packer: Packer) -> int:
    """Replace every nn.Linear in place; returns how many. Weights shared with an embedding stay there too."""
    head = model.get_output_embeddings()
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        product = ProductLinear(linear, packer.head if linear is head else packer)
        # Of a share of a model: what it gives is brought together with the other ranks' by hooks.
        product._forward_hooks.update(linear._forward_hooks)
        setattr(parent, name.rpartition(".")[2], product)
    return len(found)
