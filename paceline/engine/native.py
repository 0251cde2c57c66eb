"""Our kernels for a decoder layer on a CPU, and how Python calls them. Without them the model's own code runs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from paceline.native import BUILD, MATH, compiled

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (*BUILD, *MATH)
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class WindowStruct(ctypes.Structure):
    """`Window` of kernels.cpp."""

    _fields_ = (
        ("row", _I),
        ("start", _I),
        ("rows", _I),
        ("keys", _P),
        ("values", _P),
        ("key_scales", _P),
        ("value_scales", _P),
        ("room", _I),
    )


class HeadsStruct(ctypes.Structure):
    """`Heads` of kernels.cpp."""

    _fields_ = (
        ("heads", _I),
        ("kv_heads", _I),
        ("dim", _I),
        ("rotary_dim", _I),
        ("scale", _F),
        ("norm_eps", _F),
        ("q_norm", _P),
        ("k_norm", _P),
        ("sliding_window", _I),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        ("qkv", _P),
        ("out", _P),
        ("gate_up", _P),
        ("down", _P),
        ("attention_norm", _P),
        ("mlp_norm", _P),
        ("heads", _P),
        ("rotates", _I),
        ("width", _I),
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library's functions; their arguments are addresses (`Tensor.data_ptr()`) and sizes. See kernels.cpp."""

    library: ctypes.CDLL

    def __post_init__(self) -> None:
        signatures = {
            "add_rms_norm": ((_P, _P, _F, _P, _F, _P, _I, _I), None),
            "silu_mul": ((_P, _P, _I, _I), None),
            "attention": ((_P, _P, _P, _P, _I, _I, _P, _P), None),
            "run_layers": ((_P, _I, _P, _P, _F, _F, _P, _P, _I, _I, _P, _P, _P, _I, _P, _P, _P), _I),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, result


@cache
def kernels() -> Kernels | str:
    """The kernels, or why there are none."""
    library = compiled(SOURCE, FLAGS)
    return library if isinstance(library, str) else Kernels(library)
