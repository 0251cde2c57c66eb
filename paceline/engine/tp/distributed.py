"""Sums over ranks by torch's own libraries: gloo over TCP for CPUs of any hosts, NCCL for GPUs.

The process groups are made by hand: torch's default group is one for a process's life, and a replica's process may see
several groups, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

from paceline.engine.tp.group import Group
from paceline.errors import EngineError


class GlooGroup(Group):
    """Over TCP, which takes a millisecond where ranks are busy. Half precision is summed in float32."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        self._group: Any = None  # torch's stubs know few of its methods
        try:
            self._group = ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise self._failed(error) from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return x.copy_(self.all_reduce(x.float()))
        try:
            self._open().allreduce([x]).wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        parts = [x.new_empty(x.shape[0], max(widths)) for _ in widths]
        try:
            self._open().allgather([parts], [padded(x, max(widths))]).wait()
        except RuntimeError as error:
            raise self._failed(error) from error
        return side_by_side(parts, widths)

    def close(self) -> None:
        self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise ValueError("the group is closed")
        return self._group

    def _failed(self, error: RuntimeError) -> EngineError:
        """gloo knows what failed, not always which rank."""
        message = f"the ranks of rank {self.rank} did not all join within {self._timeout_s:g} s, or are gone: {error}"
        return EngineError(message)


class NcclGroup(Group):
    """On the GPU that is torch's current one. Calls are put on its stream and may be captured into a CUDA graph.

    NCCL's own watchdog ends the process when a call that is not part of a graph exceeds the deadline.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        from torch import distributed

        self.rank, self.size = rank, size
        self._group: Any = None
        try:
            make: Any = distributed.ProcessGroupNCCL
            self._group = make(store, rank, size, timedelta(seconds=timeout_s))
            self.all_reduce(torch.zeros(1, device="cuda"))  # connects, which a capture must not do
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise EngineError(f"NCCL does not connect rank {rank} of {size}: {error}") from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._open().allreduce([x]).wait()  # the stream waits, not the CPU
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        parts = x.new_empty(self.size, x.shape[0], max(widths))
        self._open()._allgather_base(parts, padded(x, max(widths))).wait()
        return side_by_side(parts.unbind(), widths)

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise ValueError("the group is closed")
        return self._group


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, width], the columns of `x` first: every rank sends the same shape."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1])).contiguous()


def side_by_side(parts: Sequence[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
    """The first widths[rank] columns of each rank's part, as one table."""
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
