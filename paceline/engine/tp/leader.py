"""Rank 0's side: the replica's one scheduler, whose steps run on all ranks.

What the engine asks (`runner`) becomes operations (`plan`), which the others are sent and rank 0 executes itself
(`share`): all ranks go through the same code in the same order.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from paceline.config import EngineSettings
from paceline.engine.kv_memory import KVMemory
from paceline.engine.tp import channel, plan
from paceline.engine.tp.channel import Channel
from paceline.engine.tp.group import Group, Meeting
from paceline.engine.tp.plan import Op, Operation, Ready
from paceline.engine.tp.share import Result, Share
from paceline.errors import EngineError

logger = logging.getLogger(__name__)

LOADED = "loaded"
"""Where ranks meet once they have their weights, before they run anything together."""
JOIN_S = 300.0
"""For processes to start and connect: they import torch, on a cold disk."""
LOAD_S = 3600.0
"""For weights to be read, on every rank. One that dies meanwhile is noticed at once."""
LOOK_S, MEET_S = 0.2, 0.01
HEADS = 1
"""The dimension of an entry's tensors that is cut."""


class Leader:
    """Knows the other ranks and speaks to them. `failure` may be read in any thread; the rest is one thread's."""

    def __init__(self, size: int, store: TCPStore, meeting: Meeting, listener: socket.socket) -> None:
        self.size, self.store, self.meeting = size, store, meeting
        self._listener = listener
        self._others: dict[int, _Other] = {}
        self._waiting: list[Operation] = []
        self._share: Share | None = None
        self._heads: list[range] = []
        self._closed = False
        self.pids: dict[int, int] = {}
        """Of the other ranks, on their hosts."""
        self.group: Group | None = None
        """Closed with it."""
        self.failure: str | None = None
        """Why a rank is gone; None while all are there."""

    @classmethod
    def open(cls, settings: EngineSettings, host: str = "127.0.0.1") -> Leader:
        """Listen for the other ranks at an address of this host that they reach."""
        size = settings.tensor_parallel_size
        listener = channel.listen(host)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        key = secrets.token_bytes(32)
        ports = store.port, listener.getsockname()[1]
        return cls(size, store, Meeting(host, *ports, key.hex(), size, settings.collective_timeout_s), listener)

    def join(self) -> None:
        """Wait for the other ranks to connect. Raises EngineError if they do not, naming those that are missing."""
        deadline = time.monotonic() + JOIN_S
        while missing := sorted(set(range(1, self.size)) - self._others.keys()):
            if self.failure is not None:
                raise EngineError(self.failure)
            if time.monotonic() > deadline:
                raise EngineError(f"rank {missing[0]} did not join within {JOIN_S:.0f} s")
            found = channel.accept(self._listener, bytes.fromhex(self.meeting.key), missing, LOOK_S)
            if found is not None:
                rank, connection = found
                self._others[rank] = _Other(rank, connection, self)
        self._listener.close()

    def fail(self, rank: int, why: str) -> None:
        """A rank is gone: nobody need wait for it any more. The first reason stays. From any thread."""
        if self.failure is None and not self._closed:
            self.failure = f"rank {rank} {why}"
            logger.error("%s", self.failure)
            if self.group is not None:
                self.group.abandon(rank)

    def meet(self) -> None:
        """Wait for all ranks to have their weights, however long that takes. Raises EngineError if one is gone."""

        def look() -> None:
            if self.failure is not None:
                raise EngineError(self.failure)

        meet(self.store, self.size, look)

    def lead(self, share: Share, heads: Sequence[range]) -> None:
        """Execute with this share from now on; `heads` are every rank's of all KV heads."""
        self._share, self._heads = share, list(heads)

    def ready(self) -> list[Ready]:
        """What every other rank says of its share. Waits for it."""
        found = {rank: Ready(**plan.unpacked(self._others[rank].next(LOAD_S))) for rank in sorted(self._others)}
        self.pids = {rank: each.pid for rank, each in found.items()}
        return list(found.values())

    def tell(self, *operation: object) -> None:
        """Have an operation executed before the next step."""
        self._waiting.append(tuple(operation))

    def do(self, *operation: object) -> Result:
        """Execute what waits, and then an operation if one is given, on all ranks; what the last gives on this one."""
        operations, self._waiting = self._waiting, []
        if operation:
            operations.append(operation)
        if operations:
            self._send(plan.packed(operations))
        return self._own.do(operations)

    def gather(self, number: int, rows: slice) -> tuple[torch.Tensor, ...]:
        """Keys, values and scales of all heads, [layers, heads, tokens, …] in host memory."""
        own = self.do(Op.GATHER, number, rows.start, rows.stop)
        assert isinstance(own, tuple)
        parts = {0: [each.cpu() for each in own]}
        parts |= {rank: other.tensors(self.meeting.timeout_s, len(own)) for rank, other in self._others.items()}
        return tuple(self._whole([parts[rank][n] for rank in range(self.size)]) for n in range(len(own)))

    def scatter(self, number: int, start: int, tensors: Sequence[torch.Tensor]) -> None:
        """Write what `gather` gave, each rank its heads."""
        end = start + tensors[0].shape[2]
        self.do(Op.SCATTER, number, start, end)
        for rank, heads in enumerate(self._heads):
            part = [each.cpu()[:, heads.start : heads.stop].contiguous() for each in tensors]
            if rank == 0:
                self._own.put(number, start, part)
            else:
                self._others[rank].send(*plan.tensors_said(part))

    def memory(self, number: int) -> KVMemory:
        """This rank's share of a memory that was opened."""
        return self._own.memories[number]

    def check(self, memory: int, charged: Mapping[int, int]) -> None:
        """Raise EngineError unless the entries of this rank's share of a memory are these, each with its room."""
        self.do()
        self._own.check(memory, charged)

    def close(self) -> None:
        """Let the other ranks end. Idempotent."""
        self._closed = True
        if self._share is not None and self.failure is None:
            # First: NCCL waits for graphs that hold its calls. After a loss a GPU may be stuck in one.
            self._share.runner.close()
        self._listener.close()
        for other in self._others.values():
            other.close()
        if self.group is not None:
            self.group.close()

    @property
    def _own(self) -> Share:
        assert self._share is not None, "no share was loaded"
        return self._share

    def _send(self, data: bytes) -> None:
        if self.failure is not None:
            raise EngineError(self.failure)
        for other in self._others.values():
            other.send(data)

    def _whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Where ranks share a head, either's is the same."""
        shape = list(parts[0].shape)
        shape[HEADS] = max(heads.stop for heads in self._heads)
        whole = parts[0].new_empty(shape)
        for heads, part in zip(self._heads, parts, strict=True):
            whole[:, heads.start : heads.stop] = part
        return whole


def meet(store: TCPStore, size: int, look: Callable[[], None] = lambda: None) -> None:
    """Wait for all ranks to come here, which is where they have their weights; `look` may raise meanwhile."""
    store.add(LOADED, 1)
    deadline = time.monotonic() + LOAD_S
    while store.add(LOADED, 0) < size:
        look()
        if time.monotonic() > deadline:
            raise EngineError(f"a rank did not load its share within {LOAD_S:.0f} s")
        time.sleep(MEET_S)


@dataclass(eq=False)
class _Other:
    """Another rank. A thread reads what it says, so that its end is noticed whatever this rank does meanwhile."""

    rank: int
    channel: Channel
    leader: Leader
    _said: queue.Queue[bytearray | None] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, name=f"rank {self.rank}", daemon=True).start()

    def send(self, *frames: bytes | memoryview) -> None:
        try:
            self.channel.send(*frames)
        except OSError as error:
            self.leader.fail(self.rank, f"is gone: {error}")
            raise EngineError(self.leader.failure or f"rank {self.rank} is gone") from error

    def next(self, timeout_s: float) -> bytearray:
        try:
            said = self._said.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineError(f"rank {self.rank} did not answer within {timeout_s:.0f} s") from None
        if said is None:
            raise EngineError(self.leader.failure or f"rank {self.rank} is gone")
        return said

    def tensors(self, timeout_s: float, count: int) -> list[torch.Tensor]:
        return plan.tensors_heard([self.next(timeout_s) for _ in range(count + 1)])

    def close(self) -> None:
        self.channel.close()

    def _read(self) -> None:
        while (said := self.channel.receive()) is not None:
            if said.startswith(FAILED):
                self.leader.fail(self.rank, f"failed: {said.removeprefix(FAILED).decode()}")
            else:
                self._said.put(said)
        self.leader.fail(self.rank, "is gone")
        self._said.put(None)


FAILED = b"failed "
"""How a last word begins; the rest says why."""
