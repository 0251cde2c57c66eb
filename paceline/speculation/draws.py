"""The kernel that draws rows of logits on a CPU: what `coupling` defines, in a twentieth of torch's time.

It computes logarithms for the few tokens that may win a row instead of for all, and passes over a row a few times
instead of fifteen: draws.cpp says how. What it finds is what torch finds. Where rounding could decide otherwise, once
in some hundred thousand rows, it says that it does not know.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.native import BUILD, MATH, compiled
from paceline.types import SamplingParams

SOURCE = Path(__file__).with_name("draws.cpp")
FLAGS = (*BUILD, *MATH)
UNDECIDED = -1

_P, _I = ctypes.c_void_p, ctypes.c_int64


class RowStruct(ctypes.Structure):
    """`Row` of draws.cpp."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("top_p", ctypes.c_double),
        ("top_k", _I),
        ("temperature", ctypes.c_float),
        ("log_min_p", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class DrawKernel:
    """The library's function. See draws.cpp."""

    library: ctypes.CDLL

    def __post_init__(self) -> None:
        function = self.library.draw_rows
        function.argtypes, function.restype = (_P, _I, _I, _I, _P, _P, _P), _I

    @staticmethod
    def takes(logits: torch.Tensor) -> bool:
        """Whether it draws rows like these at all."""
        return logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(-1) == 1

    def draw(
        self, logits: torch.Tensor, params: Sequence[SamplingParams], starts: Sequence[int], ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, bool]:
        """The column that each row of `logits`, [n, m], draws, int64 [n], and whether all are decided: the others
        are UNDECIDED.

        `params` and `starts`, of the noise's counters, have an entry for each row; `ids`, int64 [m], are the tokens of
        the columns, None for 0, 1, ….
        """
        count, width = logits.shape
        rows = (RowStruct * count)(*(_row(each, start, width) for each, start in zip(params, starts, strict=True)))
        columns = torch.empty(count, dtype=torch.int64)
        where = None if ids is None else ids.data_ptr()
        undecided = self.library.draw_rows(
            logits.data_ptr(), count, width, logits.stride(0), where, rows, columns.data_ptr()
        )
        return columns, not undecided


def build() -> DrawKernel | str:
    """The kernel, or why there is none."""
    library = compiled(SOURCE, FLAGS)
    return library if isinstance(library, str) else DrawKernel(library)


def _row(params: SamplingParams, start: int, width: int) -> RowStruct:
    top_k = params.top_k if params.top_k < width else 0
    log_min_p = float(torch.tensor(params.min_p).log()) if params.min_p else -torch.inf
    return RowStruct(start, params.top_p, top_k, 0.0 if params.greedy else params.temperature, log_min_p)
