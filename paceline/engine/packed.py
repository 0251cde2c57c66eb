"""Weights of 4 or 8 bits times activations of 16, 8 or more: our kernels of linear.cpp, from Python.

Where the weights already lie on such a grid, as those of GGUF's Q4_1, Q4_0 and Q8_0 and of GPTQ and AWQ do, the packed
form is the same numbers in a sixth or less of float32's bytes. Activations of 16 bits cost 2e-5 of a product's norm, of
8 bits 5e-3: over the layers of smollm2-135m 3e-3 nats a token. One row takes as long either way, the memory's time;
six rows take 1.7 times as long with 16. Activations that stay floats (fp32, or bf16 for its 8 bits) are for comparing
with: they take longer than 16 bits and are hardly more precise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from paceline.native import BUILD, compiled

Activations = Literal["int16", "int8", "fp32", "bf16"]
SOURCE = Path(__file__).with_name("linear.cpp")
FLAGS = (*BUILD, "-ffp-contract=off")
"""Nothing that lets sums be reordered: a row's result must have the same bits whatever the batch."""
GROUP = 32
"""Consecutive inputs that share a scale."""
PANEL = 16
LARGEST = {4: 65504.0, 8: torch.finfo(torch.float32).max}
"""Weight that can be rounded: offsets of 4-bit weights are fp16."""
ACTIVATIONS: tuple[Activations, ...] = ("int16", "int8", "fp32", "bf16")
"""What a group's activations may be rounded to, in the order of linear.cpp's numbers for them."""
ACTIVATION_ERROR: Mapping[Activations, float] = {"int16": 0.01, "int8": 0.5, "fp32": 0.01, "bf16": 0.5}
"""Of a product of 64 normal inputs: some 20 times what it is if all is well."""
SAMPLE = 16
"""Outputs looked at before all of them are packed."""

_P, _I = ctypes.c_void_p, ctypes.c_int64


class Offsets(IntEnum):
    """What the offsets of 4-bit weights are stored as."""

    FP16 = 0
    ZERO_POINTS = 1


class MatrixStruct(ctypes.Structure):
    """`Matrix` of linear.cpp."""

    _fields_ = (
        ("packed", _P),
        ("bias", _P),
        ("bits", _I),
        ("offsets", _I),
        ("activations", _I),
        ("outputs", _I),
        ("inputs", _I),
    )


@dataclass(frozen=True, slots=True)
class LinearKernels:
    """The library's functions; their arguments are addresses and sizes. See linear.cpp."""

    library: ctypes.CDLL

    def __post_init__(self) -> None:
        signatures = {
            "packed_bytes": ((_I, _I, _I), _I),
            "pack": ((_P, _I, _I, _I, _I, _I, _P), _I),
            "unpack_rows": ((_P, _P, _I, _P), _I),
            "product": ((_P, _P, _I, _P), None),
            "takes_bytes": ((_I,), _I),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, result

    def takes_bytes(self, bits: int) -> bool:
        """Whether activations of 8 bits can meet weights of `bits` on this CPU."""
        return bool(self.library.takes_bytes(bits))

    @property
    def product_address(self) -> int:
        """Of the C function `product`, for kernels that call it themselves."""
        return ctypes.cast(self.library.product, ctypes.c_void_p).value or 0


@cache
def linear_kernels(flags: Sequence[str] = FLAGS) -> LinearKernels | str:
    """The kernels, or why there are none."""
    library = compiled(SOURCE, flags)
    if isinstance(library, str):
        return library
    library.lanes.restype = _I
    if not library.lanes():
        return "the CPU has neither AVX-512 nor AVX2"
    found = LinearKernels(library)
    right = all(_right(found, bits, activations) for bits in LARGEST for activations in ACTIVATIONS)
    return found if right else "this compiler builds them wrong"


def _right(kernels: LinearKernels, bits: int, activations: Activations) -> bool:
    """Whether a small product comes out right: of vectorizing code like this, compilers have bugs."""
    weight, x = torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(0))
    made = packed(kernels, weight, None, bits, activations, round_group=GROUP)
    if made is None:
        return False
    rows = made.rows(torch.arange(33))
    same_weights = torch.allclose(rows, weight, rtol=0, atol=4.0 / 2**bits)
    return same_weights and torch.allclose(made(x), x @ rows.T, rtol=0, atol=ACTIVATION_ERROR[activations])


class PackedWeight:
    """y = x W^T + b, float32 [rows, inputs] to [rows, outputs]. Made by `packed`.

    A row's result has the same bits in every batch and on any number of threads.
    """

    def __init__(
        self,
        kernels: LinearKernels,
        data: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        bits: int,
        offsets: Offsets,
        activations: Activations,
    ) -> None:
        self.outputs, self.inputs = shape
        self._data, self._bias = data, bias
        bias_address = None if bias is None else bias.data_ptr()
        self._matrix = MatrixStruct(
            data.data_ptr(), bias_address, bits, offsets, ACTIVATIONS.index(activations), self.outputs, self.inputs
        )
        self.address = ctypes.addressof(self._matrix)
        """Of what `LinearKernels.product_address` takes."""
        self.kernels = kernels
        self._product, self._unpack_rows = kernels.library.product, kernels.library.unpack_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.inputs or x.dtype != torch.float32:
            raise ValueError(f"a product of {self.inputs} float32 inputs was given {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs)
        self._product(self.address, x.data_ptr(), x.numel() // self.inputs, y.data_ptr())
        return y

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64) of W, float32 [len(ids), inputs]: what an embedding tied to this weight looks up."""
        ids, found = ids.contiguous(), torch.empty(len(ids), self.inputs)
        if not self._unpack_rows(self.address, ids.data_ptr(), len(ids), found.data_ptr()):
            raise IndexError(f"rows {ids.tolist()} of {self.outputs}")
        return found

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


def packed(
    kernels: LinearKernels,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    activations: Activations = "int16",
    *,
    round_group: int | None = None,
) -> PackedWeight | None:
    """W [outputs, inputs], float32, packed: exactly, to the last bit, or else not at all (None).

    Activations of 8 bits are 16 where the CPU cannot multiply them with such weights.

    With `round_group` any other finite weight is rounded to the nearest step of a grid that so many consecutive
    inputs, a multiple of 32, share. Inputs that are no multiple of 32, and numbers beyond the grid's range, are never
    packed.
    """
    if weight.shape[1] % GROUP:
        return None
    weight = weight.contiguous()
    found = _exact(kernels, weight, bits)
    if found is None and round_group is not None:
        found = _rounded(kernels, weight, bits, round_group)
    if found is None:
        return None
    data, offsets = found
    outputs, inputs = weight.shape
    if bias is not None:
        bias = torch.nn.functional.pad(bias.detach().float(), (0, -outputs % PANEL)).contiguous()
    if activations == "int8" and not kernels.takes_bytes(bits):
        activations = "int16"
    return PackedWeight(kernels, data, bias, (outputs, inputs), bits, offsets, activations)


def _exact(kernels: LinearKernels, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, Offsets] | None:
    """The weight in the first form that has all its numbers."""
    for offsets in Offsets if bits == 4 else (Offsets.FP16,):
        if _pack(kernels, weight[:SAMPLE], bits, offsets)[1]:
            data, exact = _pack(kernels, weight, bits, offsets)
            if exact:
                return data, offsets
    return None


def _rounded(
    kernels: LinearKernels, weight: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, Offsets] | None:
    low, high = weight.aminmax()
    if not bool((-low <= LARGEST[bits]) & (high <= LARGEST[bits])):
        return None
    return _pack(kernels, weight, bits, Offsets.FP16, group)[0], Offsets.FP16


def _pack(
    kernels: LinearKernels, weight: torch.Tensor, bits: int, offsets: Offsets, round_group: int = 0
) -> tuple[torch.Tensor, bool]:
    """The packed bytes, and whether they are exactly the weights."""
    data = torch.empty(kernels.library.packed_bytes(bits, *weight.shape), dtype=torch.uint8)
    exact = kernels.library.pack(weight.data_ptr(), bits, offsets, *weight.shape, round_group, data.data_ptr())
    return data, bool(exact)
