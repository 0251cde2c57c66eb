"""What the ranks of one replica compute together. All of them make the same calls, in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paceline.errors import EngineError


class Group(ABC):
    """The ranks of one replica, numbered from 0.

    A call that other ranks do not join raises EngineError after the group's deadline; nothing is said of the tensors
    then, and the group is of no further use.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks in place of `x`, contiguous, of any shape, the same bits on every rank. Returns it."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """[rows, sum of widths]: the columns [rows, widths[rank]] of every rank side by side, on every rank."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. Idempotent."""

    @property
    def native_sum(self) -> tuple[int, int] | None:
        """For kernels that sum on their own: addresses of a C function and of its first argument. None: call here.

        `int64_t sum(void* group, float* x, int64_t n)` does what `all_reduce` does to n floats from x on. It returns 0,
        or 1 + the number of a rank that did not join before the deadline (`not_joined` makes an error of it). It calls
        no Python; one call at a time, from any one thread outside of parallel regions; valid until `close`.
        """
        return None

    def abandon(self, rank: int) -> None:
        """Rank `rank` is known to be lost: end waits now, not at their deadline, if this kind of group can.

        From any thread.
        """
        del rank


def not_joined(rank: int, timeout_s: float) -> EngineError:
    """What a wait for `rank` ends with."""
    return EngineError(f"rank {rank} did not join within {timeout_s:g} s")


class Gathering(Group):
    """A group whose first call waits for all ranks to have come so far, however long they take to read weights."""

    def __init__(self, group: Group, meet: Callable[[], None]) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group
        self._meet: Callable[[], None] | None = meet

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.met().all_reduce(x)

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return self.met().all_gather(x, widths)

    def close(self) -> None:
        self._group.close()

    def abandon(self, rank: int) -> None:
        self._group.abandon(rank)

    @property
    def native_sum(self) -> tuple[int, int] | None:
        return self._group.native_sum

    def met(self) -> Group:
        """The group itself, once all ranks are there."""
        meet, self._meet = self._meet, None
        if meet is not None:
            meet()
        return self._group


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other, made by rank 0 (`Leader.meeting`): plain data, for another process."""

    host: str
    store_port: int
    """Of a `torch.distributed.TCPStore`, by which a group is set up."""
    plan_port: int
    """Of rank 0's plans."""
    key: str
    """Hexadecimal; only who knows it gets plans."""
    size: int
    timeout_s: float
