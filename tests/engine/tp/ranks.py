"""Ranks in processes of their own, which do in their group what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch.distributed import TCPStore

from paceline.config import Collectives
from paceline.engine.tp.group import Group
from paceline.engine.tp.groups import open_group
from paceline.errors import PacelineError
from tests.engine.tp.forks import forks

Job = Callable[[Group], object]
CPU = torch.device("cpu")
PATIENCE_S = 60.0
READY = "ready"


@dataclass(frozen=True)
class Peer:
    """Another rank. `tell` it a job of this module's functions; `answer` is what the job returned."""

    process: BaseProcess
    pipe: Connection

    def tell(self, job: Job) -> None:
        self.pipe.send(job)

    def answer(self) -> object:
        assert self.pipe.poll(PATIENCE_S), "a rank does not answer"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass(frozen=True)
class Ranks:
    """Rank 0 in the test's process, the others in theirs."""

    group: Group
    peers: Sequence[Peer]

    def do(self, job: Job) -> list[object]:
        """What every rank's `job` returns."""
        for peer in self.peers:
            peer.tell(job)
        return [job(self.group), *(peer.answer() for peer in self.peers)]


@contextmanager
def ranks(
    size: int, collectives: Collectives = "shm", *, timeout_s: float = PATIENCE_S, one_host: bool = True
) -> Iterator[Ranks]:
    """A group of `size` ranks; all processes are gone afterwards."""
    with store() as (mine, port):
        opened = partial(open_at, port, size=size, collectives=collectives, timeout_s=timeout_s, one_host=one_host)
        with peers([partial(opened, rank) for rank in range(1, size)]) as others:
            group = open_group(
                mine, 0, size, collectives=collectives, device=CPU, timeout_s=timeout_s, one_host=one_host
            )
            try:
                yield Ranks(group, others)
            finally:
                group.close()


@contextmanager
def store() -> Iterator[tuple[TCPStore, int]]:
    made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield made, made.port


@contextmanager
def peers(openings: Sequence[Callable[[], Group]]) -> Iterator[list[Peer]]:
    """A process for each way to get a group; all have started, which may take seconds, when they open theirs."""
    context = forks()
    started = []
    try:
        for opening in openings:
            here, there = context.Pipe()
            process = context.Process(target=obey, args=(opening, there), daemon=True)
            process.start()
            started.append(Peer(process, here))
        for peer in started:
            assert peer.answer() == READY
            peer.pipe.send(READY)
        yield started
    finally:
        for peer in started:
            peer.kill()


def open_at(port: int, rank: int, *, size: int, collectives: Collectives, timeout_s: float, one_host: bool) -> Group:
    theirs = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=PATIENCE_S))
    return open_group(theirs, rank, size, collectives=collectives, device=CPU, timeout_s=timeout_s, one_host=one_host)


def obey(opening: Callable[[], Group], pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(READY)
    pipe.recv()
    group = opening()
    while True:
        job: Job = pipe.recv()
        try:
            pipe.send(job(group))
        except PacelineError as error:
            pipe.send(error.message)


def part(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What a rank has computed: known to all, for comparing."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def summed(group: Group, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[float]:
    return group.all_reduce(part(group.rank, shape).to(dtype)).float().flatten().tolist()


def gathered(group: Group, rows: int, widths: Sequence[int]) -> list[list[float]]:
    return group.all_gather(part(group.rank, (rows, widths[group.rank])), widths).tolist()


def nothing(group: Group) -> str:
    """Answers once the rank has its group."""
    return type(group).__name__
