"""Which cores and which memory each rank of a replica gets on this machine. Imports nothing heavy. Linux.

A rank reads its share of the weights for every token. Where a machine has several memories, each near some of the
cores (NUMA nodes: sockets, or parts of one), that is as fast as it can be if weights and threads are on the same node.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paceline.errors import ConfigError
from paceline.hardware import affinity, cgroup_quota

logger = logging.getLogger(__name__)

SYSTEM = Path("/sys/devices/system")
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Numbers of the system call."""
MPOL_BIND, MPOL_INTERLEAVE = 2, 3


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node with its physical cores that this process may use. `memory` in bytes, 0 where it is not told."""

    number: int
    cores: tuple[tuple[int, ...], ...]
    """Of each core, its hardware threads that may be used, ascending."""
    memory: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes that have cores for this process, ascending. `quota`: whole cores of its cgroup, None without a limit."""

    nodes: tuple[Node, ...]
    quota: int | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """One rank's cores, by one hardware thread each, and the nodes its memory comes from (none: from anywhere).

    Where it is not `bound`, the cores say how many threads the rank should have, not which.
    """

    rank: int
    cores: tuple[int, ...]
    nodes: tuple[int, ...] = ()
    bound: bool = True


def read_topology(root: Path = SYSTEM, allowed: Collection[int] | None = None, quota: int | None = None) -> Topology:
    """Of `root`, a sysfs' devices/system; `allowed` hardware threads, or else this process's affinity and quota."""
    if allowed is None:
        allowed, quota = affinity(), cgroup_quota()
    found = [_node(root, folder, allowed) for folder in sorted((root / "node").glob("node[0-9]*"), key=_number)]
    nodes = tuple(node for node in found if node.cores)
    # A kernel without NUMA has no nodes: all is one.
    return Topology(nodes or (Node(0, _cores(root, allowed), 0),), quota)


def bindings(size: int, *, cores_per_rank: int | Literal["auto"], numa_bind: bool, topology: Topology) -> list[Binding]:
    """What each of `size` ranks gets. ConfigError if cores_per_rank is more than one of them can have.

    With as many nodes as ranks, or more, a rank gets a node, or several adjacent ones; else, or if that left a rank
    less than half of an even share, the cores are split evenly in their order. A core's hardware threads are never
    apart, and one of them is used.
    """
    shares = _by_node(size, topology) if numa_bind else None
    if shares is None:
        shares = _evenly(size, [(node.number, core) for node in topology.nodes for core in node.cores])
    least = min(len(share) for share in shares)
    if cores_per_rank != "auto" and cores_per_rank > least:
        raise ConfigError(
            f"engine.cores_per_rank is {cores_per_rank}, but of {_amount(topology)} each of {size} ranks can have "
            f"{least}: set at most {least}, or auto",
            param="engine.cores_per_rank",
        )
    most = cores_per_rank if cores_per_rank != "auto" else max(1, (topology.quota or 2**31) // size)
    several = numa_bind and len(topology.nodes) > 1
    return [_binding(rank, share[:most], several, numa_bind) for rank, share in enumerate(shares)]


def apply(binding: Binding) -> None:
    """Bind this process: all its threads to the cores, the calling thread and those it starts later to the memory.

    Call it before anything large is allocated and before torch starts threads. What the system refuses, as some
    containers do, is logged, and the process goes on unbound.
    """
    if not binding.bound:
        return
    try:
        for thread in Path("/proc/self/task").iterdir():
            _pin(int(thread.name), binding.cores)
        if binding.nodes:
            set_memory_policy(binding.nodes)
    except OSError as error:
        logger.warning("rank %d is not bound to its cores and memory: %s", binding.rank, error)


def set_memory_policy(nodes: Sequence[int]) -> None:
    """Memory of one node alone; of several in turn, page by page. OSError where the system refuses."""
    call = SET_MEMPOLICY.get(platform.machine())
    if call is None:
        raise OSError(f"no memory policy is known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    mask = node_mask(nodes)
    bits = 8 * ctypes.sizeof(mask) + 1  # the kernel looks at one bit less than it is told
    mode = MPOL_BIND if len(nodes) == 1 else MPOL_INTERLEAVE
    if libc.syscall(ctypes.c_long(call), ctypes.c_long(mode), mask, ctypes.c_ulong(bits)):
        raise OSError(ctypes.get_errno(), f"memory policy: {os.strerror(ctypes.get_errno())}")


def node_mask(nodes: Sequence[int]) -> ctypes.Array[ctypes.c_ulong]:
    """A bit for each node, in the kernel's words."""
    width = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(nodes) // width + 1))()
    for node in nodes:
        mask[node // width] |= 1 << node % width
    return mask


def _pin(thread: int, cores: Sequence[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        return  # it has ended


Share = list[tuple[int, tuple[int, ...]]]
"""Cores with their nodes."""


def _by_node(size: int, topology: Topology) -> list[Share] | None:
    """Whole nodes for every rank, or None if there are too few, or some too small."""
    nodes = topology.nodes
    each = len(nodes) // size
    starts = [rank * len(nodes) // size for rank in range(size)]
    shares = [[(node.number, core) for node in nodes[at : at + each] for core in node.cores] for at in starts]
    total = sum(len(node.cores) for node in nodes)
    return shares if each and 2 * size * min(map(len, shares)) >= total else None


def _evenly(size: int, cores: Share) -> list[Share]:
    """Contiguous runs, equally long; more ranks than cores share them."""
    each = max(1, len(cores) // size)
    starts = [rank * len(cores) // size for rank in range(size)]
    return [cores[at : at + each] for at in starts]


def _binding(rank: int, share: Share, several_nodes: bool, bound: bool) -> Binding:
    nodes = tuple(sorted({node for node, _ in share})) if several_nodes else ()
    return Binding(rank, tuple(core[0] for _, core in share), nodes, bound)


def _amount(topology: Topology) -> str:
    cores = sum(len(node.cores) for node in topology.nodes)
    return f"{cores} cores on {len(topology.nodes)} NUMA node{'s' * (len(topology.nodes) > 1)}"


def _node(root: Path, folder: Path, allowed: Collection[int]) -> Node:
    threads = [thread for thread in _listed(folder / "cpulist") if thread in allowed]
    return Node(_number(folder), _cores(root, threads), _memory(folder / "meminfo"))


def _cores(root: Path, threads: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """The hardware threads by physical core, in the order of each core's first."""
    cores = []
    left = set(threads)
    for thread in sorted(threads):
        if thread in left:
            siblings = _listed(root / "cpu" / f"cpu{thread}" / "topology" / "thread_siblings_list")
            cores.append(tuple(sorted({thread, *siblings} & left)))
            left.difference_update(cores[-1])
    return tuple(cores)


def _listed(path: Path) -> list[int]:
    """Numbers of a list as the kernel writes it, 0-3,8; none if there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [number for part in text.split(",") if part for number in _run(part)]


def _run(part: str) -> Iterator[int]:
    first, _, last = part.partition("-")
    yield from range(int(first), int(last or first) + 1)


def _memory(path: Path) -> int:
    """Bytes; the line is `Node 0 MemTotal: 1024 kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[3]) * 1024 for line in lines if " MemTotal:" in line), 0)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("node"))
