"""What one sum over the ranks of a CPU replica costs: a hidden state in float32, summed twice a layer.

    python benchmarks/all_reduce.py                    # two ranks, one thread and core each
    python benchmarks/all_reduce.py --ranks 4          # on more cores
    python benchmarks/all_reduce.py --only shm gloo    # two of the kinds

Microseconds of a call on rank 0: median, least and most in brackets; the kinds take turns. First ranks do nothing else;
then they compute for 0.2 ms before each call, as layers do, and a call includes waiting for the slower. DeepSpeed's
shared memory is there for comparing where deepspeed is installed; its first run compiles for minutes. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed import TCPStore

from paceline.engine.tp.groups import open_group
from paceline.numa import apply, bindings, read_topology
from paceline.ports import free_ports

SHAPES = ((1, 768), (1, 4096), (6, 4096), (32, 4096), (512, 4096))
BUSY_S = 2e-4
WORK = ((0.0, "idle ranks"), (BUSY_S, "ranks busy for 0.2 ms between the calls"))
KINDS = ("shm", "gloo", "deepspeed")
TIMEOUT_S = 120.0
ROUNDS, WARM_UP = 5, 5
AllReduce = Callable[[torch.Tensor], object]
Times = dict[tuple[float, tuple[int, int], str], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    kinds = list(arguments.only)
    if "deepspeed" in kinds and find_spec("deepspeed") is None:
        print("deepspeed is not installed, so it is left out: pip install 'paceline[tp]'")
        kinds.remove("deepspeed")
    report(measured(kinds, arguments.ranks), kinds, arguments.ranks)


def measured(kinds: Sequence[str], size: int) -> Times:
    """Seconds of each call on rank 0, of `size` processes."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (port,) = free_ports(1)
    here, there = context.Pipe(duplex=False)
    started = [context.Process(target=run, args=(kinds, rank, size, store.port, port, there)) for rank in range(size)]
    for process in started:
        process.start()
    there.close()
    try:
        found: Times = here.recv()
    finally:
        for process in started:
            process.join(TIMEOUT_S)
            process.kill()
        for left_behind in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
            left_behind.unlink()
    return found


def run(kinds: Sequence[str], rank: int, size: int, store_port: int, own_port: int, pipe: Connection) -> None:
    """One rank, bound to a core."""
    apply(bindings(size, cores_per_rank=1, numa_bind=True, topology=read_topology())[rank])
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", store_port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    sums = {
        kind: deepspeeds(rank, size, own_port) if kind == "deepspeed" else ours(kind, store, rank, size)
        for kind in kinds
    }
    found: Times = {}
    for (busy_s, _), shape, _, kind in product(WORK, SHAPES, range(ROUNDS), kinds):
        found.setdefault((busy_s, shape, kind), []).extend(calls(sums[kind], shape, busy_s))
    if rank == 0:
        pipe.send(found)


def ours(kind: str, store: TCPStore, rank: int, size: int) -> AllReduce:
    collectives = "shm" if kind == "shm" else "gloo"
    group = open_group(
        store, rank, size, collectives=collectives, device=torch.device("cpu"), timeout_s=TIMEOUT_S, one_host=True
    )
    return group.all_reduce


def deepspeeds(rank: int, size: int, port: int) -> AllReduce:
    """Its operator alone, without its launcher. Without LOCAL_SIZE it crashes."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False).initialize(size, rank)
    all_reduce: AllReduce = torch.ops.deepspeed.inference_all_reduce_
    return all_reduce


def calls(all_reduce: AllReduce, shape: tuple[int, int], busy_s: float) -> Iterator[float]:
    """Seconds of each call, after some that do not count. Sums of zeros stay numbers."""
    x = torch.zeros(shape)
    count = 100 if x.numel() < 2**20 else 10
    for number in range(WARM_UP + count):
        work(busy_s)
        began = time.perf_counter()
        all_reduce(x)
        seconds = time.perf_counter() - began
        if number >= WARM_UP:
            yield seconds


def work(seconds: float) -> None:
    """Products, as a layer has, for so long."""
    a = torch.ones(64, 64)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a


def report(found: Times, kinds: Sequence[str], size: int) -> None:
    for busy_s, title in WORK:
        print(f"\n{size} ranks of one thread, {title}: microseconds of a sum")
        print(f"{'':12}" + "".join(f"{kind:>26}" for kind in kinds))
        for shape in SHAPES:
            cells = (spread(found[busy_s, shape, kind]) for kind in kinds)
            print(f"{list(shape)!s:12}" + "".join(f"{cell:>26}" for cell in cells))


def spread(seconds: Sequence[float]) -> str:
    micro = [1e6 * each for each in seconds]
    return f"{statistics.median(micro):.1f} [{min(micro):.1f}-{max(micro):.1f}]"


if __name__ == "__main__":
    main()
