"""GPUs of one host that write into each other's memory, over NVLink or PCIe: the fastest way to sum a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from torch import distributed

from paceline.engine.tp.distributed import padded, side_by_side
from paceline.engine.tp.group import Group
from paceline.errors import EngineError

NANOSECONDS = 1_000_000_000
NEEDED = ("triton", "torch.distributed._symmetric_memory")


class PeerGroup(Group):
    """NCCL for whatever comes, and memory that all ranks can write to (`shared`) for kernels of ours.

    It is the process's default group of torch, which symmetric memory is made for; NVLink multicast stays as the
    environment sets it.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cuda", _index(device))
        self.timeout_ns = int(timeout_s * NANOSECONDS)
        self._kept: list[Any] = []
        try:
            distributed.init_process_group(
                "nccl",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=self.device,
            )
            self.all_reduce(torch.zeros(1, device=self.device))
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise EngineError(f"NCCL does not connect rank {rank} of {size}: {error}") from error

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why this process cannot use it, or None."""
        own = _index(device)
        others = [n for n in range(torch.cuda.device_count()) if n != own]
        if not others:
            return "this process sees no GPU but its own (CUDA_VISIBLE_DEVICES)"
        if distributed.is_initialized():
            return "this process has a default group of torch already"
        if not all(torch.cuda.can_device_access_peer(own, other) for other in others):
            return "its GPU cannot write to the others' memory"
        lacking = [name for name in NEEDED if find_spec(name) is None]
        return f"{lacking[0]} is not there" if lacking else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        parts = x.new_empty(self.size, x.shape[0], max(widths))
        distributed.all_gather_into_tensor(parts, padded(x, max(widths)))
        return side_by_side(parts.unbind(), widths)

    def shared(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """So many zeros that every rank may write to, and where every rank's are: addresses, int64 [size].

        All ranks call this at once, with the same numbers.
        """
        from torch.distributed import _symmetric_memory as symmetric

        own = symmetric.empty(count, dtype=dtype, device=self.device).zero_()
        meeting = symmetric.rendezvous(own, distributed.group.WORLD.group_name)  # type: ignore[union-attr]
        self._kept += [own, meeting]
        torch.cuda.synchronize(self.device)
        distributed.barrier()  # before anybody writes
        return own, torch.tensor(list(meeting.buffer_ptrs), dtype=torch.int64, device=self.device)

    def close(self) -> None:
        self._kept.clear()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
