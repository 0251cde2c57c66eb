"""Memory for slabs: address space first, pages when they are written."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import torch

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def lazy_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor whose pages the kernel commits one by one, when they are first written.

    Its own anonymous mapping, kept out of huge pages: one 2 MB page per head and layer would commit a slab
    at its first token. Unmapped when the tensor goes. Mapping and unmapping a slab of 377 MB that holds a short
    request takes 0.3 ms in all, so that slabs are not worth a free list, which would hold on to their pages.
    """
    size = dtype.itemsize * int(np.prod(shape))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
