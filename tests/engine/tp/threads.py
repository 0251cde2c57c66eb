"""Ranks that are threads of one process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, BrokenBarrierError, RLock
from typing import Any, TypeVar

import accelerate
import pytest
import torch

from paceline.engine import load
from paceline.engine.tp.group import Group
from paceline.errors import EngineError

T = TypeVar("T")
DEADLINE_S = 60.0

_NativeSum = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)


class Meeting:
    """What the threads of one group share."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size, timeout=DEADLINE_S)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadGroup(Group):
    """`calls` counts what this rank took part in. With `native` kernels sum on their own."""

    def __init__(self, rank: int, meeting: Meeting, *, native: bool = False) -> None:
        self.rank, self.size = rank, len(meeting.brought)
        self.calls = self.native_calls = 0
        self._meeting, self._native = meeting, native
        self._callback = _NativeSum(self._sum)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        parts = self._exchange(x)
        x.copy_(torch.stack(parts).sum(dim=0))
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        parts = self._exchange(x)
        assert [part.shape[1] for part in parts] == list(widths)
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        self._meeting.barrier.abort()

    @property
    def native_sum(self) -> tuple[int, int] | None:
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        return (address, 0) if self._native and address is not None else None

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        meeting = self._meeting
        try:
            meeting.barrier.wait()
            meeting.brought[self.rank] = x.clone()
            meeting.barrier.wait()
            return [part.clone() for part in meeting.brought]
        except BrokenBarrierError:
            raise EngineError("a rank did not come") from None

    def _sum(self, _: int | None, x: ctypes._Pointer[ctypes.c_float], n: int) -> int:
        self.native_calls += 1
        array = ctypes.cast(x, ctypes.POINTER(ctypes.c_float * n)).contents
        try:
            self.all_reduce(torch.frombuffer(array, dtype=torch.float32))
        except EngineError:
            return 1
        return 0


def on_all_ranks(size: int, work: Callable[[ThreadGroup], T], *, native: bool = False) -> list[T]:
    """What each rank's work returns. Raises what the first rank raised."""
    meeting = Meeting(size)

    def rank(number: int) -> T:
        group = ThreadGroup(number, meeting, native=native)
        try:
            with torch.inference_mode():
                return work(group)
        except BaseException:
            group.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(rank, number) for number in range(size)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, EngineError)):
        raise error
    return [future.result() for future in futures]


@contextmanager
def taking_turns() -> Iterator[None]:
    """Ranks load one after the other: accelerate makes models empty by changing `torch.nn.Module` for the process."""
    lock, empty, share = RLock(), accelerate.init_empty_weights, load._Share.load

    @contextmanager
    def alone(*args: bool, **kwargs: bool) -> Iterator[None]:
        with lock, empty(*args, **kwargs):
            yield

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return share(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "init_empty_weights", alone)
        patch.setattr(load._Share, "load", load_alone)
        yield
