"""Which kind of group the ranks of a replica use: what is asked for, or the best that all of them can."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Protocol, cast

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from paceline.config import Collectives
from paceline.engine.tp.distributed import GlooGroup, NcclGroup
from paceline.engine.tp.group import Group
from paceline.engine.tp.rendezvous import agree
from paceline.engine.tp.shared_memory import open_shared_memory
from paceline.errors import ConfigError

logger = logging.getLogger(__name__)

DEVICE_OF = {"shm": "cpu", "gloo": "cpu", "peer": "cuda", "nccl": "cuda"}


class PeerGroups(Protocol):
    """`PeerGroup`, the class: whether it runs on a device, and how it is made."""

    def missing(self, device: torch.device) -> str | None: ...

    def __call__(self, store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Group: ...


def open_group(
    store: Store,
    rank: int,
    size: int,
    *,
    collectives: Collectives,
    device: torch.device,
    timeout_s: float,
    one_host: bool,
) -> Group:
    """The group of `size` ranks that share `store`; all of them call this at once, with the same settings.

    ConfigError if these collectives cannot work on such a device or host; EngineError if a rank does not join.
    """
    check_collectives(collectives, device, one_host=one_host)
    # All ranks have opened as many groups by this store before: each group has keys of its own.
    number = store.add(f"groups of rank {rank}", 1)
    keys = PrefixStore(f"group {number}", store)
    if device.type == "cuda":
        return _on_gpus(keys, rank, size, collectives, device, timeout_s, one_host)
    return _on_cpus(keys, rank, size, collectives, timeout_s, one_host)


def check_collectives(collectives: Collectives, device: torch.device, *, one_host: bool) -> None:
    """ConfigError if they are for another kind of device, or for one host and the ranks are on several."""
    if collectives == "auto":
        return
    if DEVICE_OF[collectives] != device.type:
        fitting = ", ".join(name for name, kind in DEVICE_OF.items() if kind == device.type)
        message = f"engine.collectives is {collectives}, which is not for {device.type}: set auto, or one of {fitting}"
        raise ConfigError(message, param="engine.collectives")
    if collectives in ("shm", "peer") and not one_host:
        message = f"engine.collectives is {collectives}, but the ranks are on several hosts: set auto"
        raise ConfigError(message, param="engine.collectives")


def _on_cpus(store: Store, rank: int, size: int, collectives: Collectives, timeout_s: float, one_host: bool) -> Group:
    if collectives == "gloo" or not one_host:
        return GlooGroup(store, rank, size, timeout_s)
    found = open_shared_memory(store, rank, size, timeout_s)
    if not isinstance(found, str):
        return found
    _refuse_unless_auto(collectives, found)
    logger.warning("sums over ranks go through gloo, which is slower than shared memory: %s", found)
    return GlooGroup(store, rank, size, timeout_s)


def _on_gpus(
    store: Store, rank: int, size: int, collectives: Collectives, device: torch.device, timeout_s: float, one_host: bool
) -> Group:
    if collectives == "nccl" or not one_host:
        return NcclGroup(store, rank, size, timeout_s)
    peers = _peer_groups()
    trouble = agree(store, "peers", rank, size, peers.missing(device), timeout_s)
    if trouble is None:
        return peers(store, rank, size, device, timeout_s)
    _refuse_unless_auto(collectives, trouble)
    logger.warning("sums over ranks go through NCCL, which is slower for short steps: %s", trouble)
    return NcclGroup(store, rank, size, timeout_s)


def _refuse_unless_auto(collectives: Collectives, trouble: str) -> None:
    if collectives != "auto":
        message = f"engine.collectives is {collectives}, which does not run here: {trouble}; set auto"
        raise ConfigError(message, param="engine.collectives")


def _peer_groups() -> PeerGroups:
    """Imported when a GPU asks for it: its kernels are for nothing else."""
    return cast(PeerGroups, import_module("paceline.engine.gpu.peers").PeerGroup)
