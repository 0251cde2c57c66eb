"""Where a rank runs: its host, its cores and memory, its GPU."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from paceline import numa
from paceline.config import EngineSettings

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")


def hosts(store: TCPStore, rank: int, size: int) -> list[str]:
    """The host of every rank, which all call this; the same for those that share a host's memory."""
    store.set(f"host {rank}", json.dumps(_host()))
    return [bytes(store.get(f"host {other}")).decode() for other in range(size)]


def settled(settings: EngineSettings, rank: int, where: Sequence[str]) -> EngineSettings:
    """Bind this process to a rank's cores and memory, or its thread to its GPU; the settings with its threads.

    `where` are the ranks' hosts. Of a host's ranks the n-th takes the n-th GPU that it sees, or the only one. Raises
    ConfigError if there are fewer cores than asked for.
    """
    if settings.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(where[:rank].count(where[rank]) % torch.cuda.device_count())
        return settings
    found = numa.bindings(
        len(where), cores_per_rank=settings.cores_per_rank, numa_bind=settings.numa_bind, topology=numa.read_topology()
    )
    binding = found[rank]
    if binding.nodes or settings.cores_per_rank != "auto":
        numa.apply(binding)
        logger.info("rank %d: %s", rank, binding)
    return settings if settings.threads != "auto" else settings.model_copy(update={"threads": len(binding.cores)})


def _host() -> tuple[str, str, str]:
    """A machine since it was booted, and what of it a container sees: ranks find each other's memory by process ids."""
    booted = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return socket.gethostname(), booted, str(PROCESSES.readlink()) if PROCESSES.is_symlink() else ""
