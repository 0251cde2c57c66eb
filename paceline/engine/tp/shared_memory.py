"""Sums over ranks of one host through memory they share: shared_memory.cpp, from Python.

The memory is an anonymous file of rank 0, which the others open through /proc. It never has a name that a killed
process could leave behind, and /dev/shm, small in containers, need not have room for it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from paceline.engine.tp.group import Group, not_joined
from paceline.engine.tp.rendezvous import agree, told
from paceline.native import BUILD, compiled

SOURCE = Path(__file__).with_name("shared_memory.cpp")
SLOT_BYTES = 2**18
"""Of a rank's part at a time: what it writes is still in its cache when the others read it."""

_P, _I = ctypes.c_void_p, ctypes.c_int64


class GroupStruct(ctypes.Structure):
    """`Group` of shared_memory.cpp."""

    _fields_ = (
        ("memory", _P),
        ("rank", _I),
        ("size", _I),
        ("slot_bytes", _I),
        ("timeout_ns", _I),
        ("pieces", _I),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled functions. See shared_memory.cpp."""

    functions: ctypes.CDLL

    def __post_init__(self) -> None:
        signatures = {
            "memory_bytes": ((_I, _I), _I),
            "slot_offset": ((_I, _I, _I, _I), _I),
            "sum": ((_P, _P, _I), _I),
            "gather": ((_P, _P, _I, _P, _P), _I),
            "abandon": ((_P, _I), None),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(self.functions, name)
            function.argtypes, function.restype = arguments, result


@cache
def library() -> Library | str:
    """The functions, or why there are none here."""
    if not hasattr(os, "memfd_create"):
        return "shared memory without a name needs Linux"
    found = compiled(SOURCE, BUILD)
    return found if isinstance(found, str) else Library(found)


class SharedMemoryGroup(Group):
    """Made by `open_shared_memory`. float32 is summed as it is, half precision in float32 and rounded once."""

    def __init__(self, functions: ctypes.CDLL, memory: mmap.mmap, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._functions, self._timeout_s = functions, timeout_s
        self._memory: mmap.mmap | None = memory
        self._start: ctypes.c_char | None = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(self._start)
        self._struct = GroupStruct(address, rank, size, SLOT_BYTES, int(timeout_s * 1e9), 0)
        self._address = ctypes.addressof(self._struct)
        for buffer in (0, 1):  # whoever touches memory first has it on its own NUMA node
            ctypes.memset(address + functions.slot_offset(size, SLOT_BYTES, buffer, rank), 0, SLOT_BYTES)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous() or not x.is_floating_point():
            raise ValueError(f"a sum over ranks takes contiguous floats, not {x.dtype} {tuple(x.shape)}")
        if x.dtype != torch.float32:
            return x.copy_(self.all_reduce(x.float()))
        self._check(self._functions.sum(self._open(), x.data_ptr(), x.numel()))
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        if x.dim() != 2 or len(widths) != self.size or x.shape[1] != widths[self.rank]:
            raise ValueError(f"{tuple(x.shape)} is not [rows, widths[{self.rank}]] of the widths {list(widths)}")
        x = x.contiguous()
        table = torch.empty(x.shape[0], sum(widths), dtype=x.dtype)
        bytes_of = (ctypes.c_int64 * self.size)(*(width * x.element_size() for width in widths))
        code = self._functions.gather(self._open(), x.data_ptr(), x.shape[0], bytes_of, table.data_ptr())
        self._check(code)
        return table

    @property
    def native_sum(self) -> tuple[int, int]:
        return ctypes.cast(self._functions.sum, ctypes.c_void_p).value or 0, self._open()

    def abandon(self, rank: int) -> None:
        if self._memory is not None:
            self._functions.abandon(self._address, rank)

    def close(self) -> None:
        """Not while another thread computes: `abandon` ends that first."""
        if self._memory is not None:
            self._start = None
            self._memory.close()
            self._memory = None

    def _open(self) -> int:
        if self._memory is None:
            raise ValueError("the group is closed")
        return self._address

    def _check(self, code: int) -> None:
        if code:
            raise not_joined(code - 1, self._timeout_s)


def open_shared_memory(store: Store, rank: int, size: int, timeout_s: float) -> SharedMemoryGroup | str:
    """A group of ranks on this host, or why there is none: the same answer on every rank.

    EngineError if a rank does not join before the deadline.
    """
    found = library()
    trouble = agree(store, "shared memory", rank, size, found if isinstance(found, str) else None, timeout_s)
    if isinstance(found, str) or trouble is not None:
        return str(trouble)
    with _file(store, rank, found.functions.memory_bytes(size, SLOT_BYTES), timeout_s) as mapped:
        failure = mapped if isinstance(mapped, str) else None
        trouble = agree(store, "mapped", rank, size, failure, timeout_s)
    if isinstance(mapped, str) or trouble is not None:
        return str(trouble)
    return SharedMemoryGroup(found.functions, mapped, rank, size, timeout_s)


@contextmanager
def _file(store: Store, rank: int, size: int, timeout_s: float) -> Iterator[mmap.mmap | str]:
    """The memory, or why it cannot be had. Rank 0 keeps its file open within, for the others to find it."""
    try:
        file = _create(store, size) if rank == 0 else os.open(told(store, "file", 0, timeout_s), os.O_RDWR)
    except OSError as error:
        if rank == 0:
            store.set("file", os.devnull)
        yield f"no memory to share: {error}"
        return
    try:
        yield _map(file, size)
    finally:
        os.close(file)


def _create(store: Store, size: int) -> int:
    file = os.memfd_create("paceline-ranks")
    os.ftruncate(file, size)
    store.set("file", f"/proc/{os.getpid()}/fd/{file}")
    return file


def _map(file: int, size: int) -> mmap.mmap | str:
    try:
        return mmap.mmap(file, size)
    except (OSError, ValueError) as error:  # ValueError: not a file of this size, so not the one that was meant
        return f"memory to share cannot be mapped: {error}"
