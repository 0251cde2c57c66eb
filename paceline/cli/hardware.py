"""What this machine is: processor, memory, GPUs, disk. Reads, and decides nothing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "amx_tile", "amx_bf16")  # the ones a choice of kernels depends on

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Cpu:
    """`flags` are those of CPU_FLAGS the processor has; None where the system does not tell."""

    model: str
    flags: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. A cgroup's limit counts as the total, because the kernel kills above it."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU torch can use."""

    name: str
    memory: int


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """From /proc/cpuinfo; from `platform` where there is none."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return Cpu(platform.processor() or platform.machine(), None)
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    known = fields.get("flags")
    flags = None if known is None else tuple(flag for flag in CPU_FLAGS if flag in known.split())
    return Cpu(fields.get("model name") or platform.machine(), flags)


def read_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Of the machine, cut to the limit of the cgroup (v2) this process runs in."""
    import psutil

    seen = psutil.virtual_memory()
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return Memory(seen.total, seen.available)
    return Memory(min(seen.total, limit), min(seen.available, max(0, limit - used)))


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs torch sees. Call it only where torch imports."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(str(gpu.name), int(gpu.total_memory)) for gpu in found)


def nvidia_driver_present(device: Path = Path("/dev/nvidiactl")) -> bool:
    """Whether the NVIDIA driver offers a GPU to this machine or container, whatever torch thinks."""
    return device.exists()


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or would be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
