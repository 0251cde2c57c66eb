"""What `paceline doctor` looks at, and the problems it sees in that. `collect` reads; `problems` only judges."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.hardware import (
    GIB,
    Cpu,
    Gpu,
    Memory,
    free_disk,
    nvidia_driver_present,
    read_cpu,
    read_gpus,
    read_memory,
)
from paceline.config import cache_dir, parse_settings
from paceline.errors import PacelineError
from paceline.numa import Binding, Node, bindings, read_topology
from paceline.ports import ALL_INTERFACES, why_unusable

if TYPE_CHECKING:
    from paceline.engine.backends import Choice

PACKAGES = ("torch", "transformers", "ray", "grpc")
QUANTIZERS = {
    "bitsandbytes": ("engine.quantization in 8 and 4 bits", "pip install 'paceline[gpu]'"),
    "torchao": ("engine.quantization in int8, int4 and fp8", "pip install 'paceline[quantization]'"),
    "accelerate": ("engine.device_map: auto", "pip install accelerate"),
}
"""What each is for, and how to get it."""
HTTP_PORT = 8000
GRPC_PORT = 9000
MIN_DISK = 1 * GIB  # the demo model's download, its conversion and a margin
MIN_MEMORY = 4 * GIB  # Ray and five replica processes
MIN_SHARED_MEMORY = 100 * 2**20
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong and what to do about it. While a `required` one stands, nothing runs."""

    summary: str
    remedy: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Package:
    """A package that must import: its version, or else why it does not."""

    name: str
    version: str | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Library:
    """One that a GPU makes use of, what for, and how to get it where it is `missing`."""

    name: str
    purpose: str
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """The folder models are kept in; `free` is in bytes."""

    folder: str
    free: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Port:
    """A default port; `trouble` says why nothing could listen on it now."""

    number: int
    purpose: str
    trouble: str | None


@dataclass(frozen=True, slots=True)
class Engine:
    """What the engine would choose here, or why it cannot choose. `cores` respects affinity and cgroup quota."""

    cores: int | None
    choices: tuple[Choice, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """A kind of engine.collectives, by which ranks sum; `missing` says why it does not run here."""

    name: str
    missing: str | None


@dataclass(frozen=True, slots=True)
class Ranks:
    """How a replica of several ranks would share this machine: as many as it has nodes, but two at least."""

    nodes: tuple[Node, ...] = ()
    bindings: tuple[Binding, ...] = ()
    collectives: tuple[Sums, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Everything looked at. Memory and disk are in bytes; `shared_memory` is None where /dev/shm is not used."""

    cpu: Cpu
    memory: Memory
    shared_memory: int | None
    gpus: tuple[Gpu, ...]
    nvidia_driver: bool
    python: str
    packages: tuple[Package, ...]
    engine: Engine
    cache: Cache
    ports: tuple[Port, ...]
    libraries: tuple[Library, ...] = ()
    ranks: Ranks = Ranks()


def collect() -> Report:
    """Look at this machine. Takes some seconds: it imports what a replica would import."""
    packages = tuple(read_package(name) for name in PACKAGES)
    torch_works = packages[0].error is None
    return Report(
        cpu=read_cpu(),
        memory=read_memory(),
        shared_memory=free_disk(SHARED_MEMORY) if SHARED_MEMORY.exists() else None,
        gpus=read_gpus() if torch_works else (),
        nvidia_driver=nvidia_driver_present(),
        python=platform.python_version(),
        packages=packages,
        engine=read_engine() if torch_works else Engine(None, (), "torch does not import"),
        cache=read_cache(cache_dir()),
        ports=(
            Port(HTTP_PORT, "HTTP", why_unusable("127.0.0.1", HTTP_PORT)),
            Port(GRPC_PORT, "gRPC", why_unusable(ALL_INTERFACES, GRPC_PORT)),
        ),
        libraries=read_libraries(),
        ranks=read_ranks(torch_works),
    )


def read_package(name: str) -> Package:
    """Import a package: the only proof that it works."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken binary raises anything, and that is what we are here to find
        return Package(name, None, " ".join(f"{type(error).__name__}: {error}".split()))
    return Package(name, str(getattr(module, "__version__", "unknown")))


def read_libraries() -> tuple[Library, ...]:
    """What a GPU makes use of, without importing it."""
    from paceline.engine.gpu.kinds import missing

    attention = (
        Library("triton", "our attention kernel, fused layers, draws", missing("triton")),
        Library("flash-attn 3", "engine.attn_implementation: flash_attention_3", missing("flash_attention_3")),
    )
    others = (
        Library(name, purpose, None if find_spec(name) is not None else f"{name} is not installed; {remedy}")
        for name, (purpose, remedy) in QUANTIZERS.items()
    )
    return (*attention, *others)


def read_engine() -> Engine:
    """The engine's choices with every setting on "auto"."""
    from paceline.engine.backends import describe
    from paceline.hardware import usable_cores

    cores = usable_cores()
    try:
        return Engine(cores, tuple(describe(parse_settings({}).target.engine)))
    except PacelineError as error:
        return Engine(cores, (), error.message)


def read_ranks(torch_works: bool) -> Ranks:
    """Nodes, the bindings of their ranks, and what those could sum by."""
    topology = read_topology()
    size = max(2, len(topology.nodes))
    bound = bindings(size, cores_per_rank="auto", numa_bind=True, topology=topology)
    return Ranks(topology.nodes, tuple(bound), read_collectives() if torch_works else ())


def read_collectives() -> tuple[Sums, ...]:
    """Those that one machine can tell about: of GPUs' own, whether torch has NCCL."""
    from torch import cuda, distributed

    from paceline.engine.tp.shared_memory import library

    found = library()
    gloo = None if distributed.is_gloo_available() else "torch was built without it"
    nccl = None if distributed.is_nccl_available() else "torch was built without it"
    return (
        Sums("shm", found if isinstance(found, str) else None),
        Sums("gloo", gloo),
        Sums("nccl", nccl if cuda.is_available() else "torch sees no GPU"),
    )


def read_cache(folder: Path) -> Cache:
    """Where models are kept, without creating it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Cache(str(folder), free_disk(folder), os.access(existing, os.W_OK | os.X_OK))


def problems(report: Report) -> list[Problem]:
    """What stands in the way, the required first."""
    found = [*_software(report), *_libraries(report), *_hardware(report), *_places(report)]
    return sorted(found, key=lambda problem: not problem.required)


def _software(report: Report) -> list[Problem]:
    found = [
        Problem(
            f"{package.name} does not import: {package.error}", "reinstall with `make clean install`", required=True
        )
        for package in report.packages
        if package.error
    ]
    if report.engine.error and not found:
        found.append(
            Problem(
                f"the engine cannot run: {report.engine.error}",
                "every setting was on auto, so this is a bug: please report it",
                required=True,
            )
        )
    return found


def _libraries(report: Report) -> list[Problem]:
    """Nothing without a GPU lacks them."""
    missing = [each for each in report.libraries if each.missing is not None and report.gpus]
    return [Problem(f"no {each.name}: {each.purpose} is not available", str(each.missing)) for each in missing]


def _hardware(report: Report) -> list[Problem]:
    found = []
    if report.nvidia_driver and not report.gpus:
        remedy = "install the CUDA build of torch, or check CUDA_VISIBLE_DEVICES"
        found.append(Problem("there is an NVIDIA driver, but torch sees no GPU", remedy))
    if report.cpu.flags is not None and "avx2" not in report.cpu.flags and not report.gpus:
        found.append(Problem("the CPU has no AVX2: matrix products take the slow path", "use a CPU from 2014 or later"))
    if report.memory.free < MIN_MEMORY:
        remedy = "free memory, or serve with --targets 1 --drafts 1"
        found.append(Problem(f"only {report.memory.free / GIB:.1f} GiB of memory are free", remedy))
    if report.shared_memory is not None and report.shared_memory < MIN_SHARED_MEMORY:
        remedy = "start the container with --shm-size=256m"
        found.append(Problem(f"{SHARED_MEMORY} is small: {report.shared_memory / 2**20:.0f} MiB free", remedy))
    return found


def _places(report: Report) -> list[Problem]:
    found = []
    if not report.cache.writable:
        remedy = "set PACELINE_CACHE to a folder you may write to"
        found.append(Problem(f"the model cache {report.cache.folder} cannot be written", remedy, required=True))
    elif report.cache.free < MIN_DISK:
        remedy = "free disk space, or set PACELINE_CACHE to a larger disk"
        found.append(Problem(f"the model cache has {report.cache.free / GIB:.1f} GiB of disk left", remedy))
    for port in report.ports:
        if port.trouble:
            option = "--port" if port.purpose == "HTTP" else "--grpc-port"
            remedy = f"stop what uses it, or serve with {option}"
            found.append(Problem(f"port {port.number} ({port.purpose}): {port.trouble}", remedy))
    return found
