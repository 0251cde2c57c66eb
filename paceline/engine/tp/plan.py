"""What rank 0 says to the others: operations on numbered memories and entries, and steps over them.

Operations that change KV wait for the next step and travel with it, so that a step is one message: of a plain decode
some 20 bytes and 10 for each sequence. They are executed in their order on every rank, rank 0 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol

import msgpack
import torch

from paceline.engine.attention import Window
from paceline.engine.kv_entry import KVEntry
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams

Operation = tuple[Any, ...]
"""An `Op` and its arguments, plain data."""


class Op(StrEnum):
    """Names on the wire, with their arguments. `memory` and `entry` are numbers that rank 0 gives."""

    OPEN = "open"  # memory, tokens of room, longest sequence, whether keys and values are int8
    CLOSE = "close"  # memory
    WARM_UP = "warm"  # memory
    ENTER = "enter"  # memory, entry, room
    WIDEN = "widen"  # entry, room, tokens held
    TRIM = "trim"  # entry, room
    DROP = "drop"  # entry
    FORK = "fork"  # from entry, to entry, tokens
    FILL = "fill"  # entry, tokens
    MOVE = "move"  # entry, first, end, by: KeyShift.move
    GATHER = "gather"  # entry, first, end: every rank sends its tensors
    SCATTER = "scatter"  # entry, first, end: every rank is sent its tensors
    RUN = "run"  # windows
    LAUNCH = "launch"  # windows, draws, feeds
    COLUMNS = "columns"  # ids: Runner.name_columns


@dataclass(frozen=True, slots=True)
class Ready:
    """What another rank says once it has its share."""

    kv_tokens: int
    """Tokens it has room for."""
    forward_pass: str
    """By which it runs; all ranks by the same, or they wait for each other for ever."""
    pid: int
    device_bytes: int
    """Of its GPU that its share takes; 0 on a CPU."""


@dataclass(eq=False, slots=True)
class SharedEntry(KVEntry):
    """An entry whose keys and values lie in shares on all ranks, which know it by its `number`.

    Rank 0's cache keeps the account with it. Its tensors have the shape of the whole and no memory; `taken` and `put`
    go through `parts`, to all ranks.
    """

    number: int = 0
    parts: Parts | None = None

    @property
    def is_slab(self) -> bool:
        return False

    def taken(self, rows: slice) -> tuple[torch.Tensor, ...]:
        assert self.parts is not None
        return self.parts.gather(self.number, rows)

    def put(self, start: int, tensors: Sequence[torch.Tensor]) -> None:
        assert self.parts is not None
        self.parts.scatter(self.number, start, tensors)

    def fill(self, tokens: int) -> None:
        assert self.parts is not None
        self.parts.tell(Op.FILL, self.number, tokens)


class Parts(Protocol):
    """The keys and values of entries, put together from all ranks and cut up again, in host memory; or an operation on
    them, before the next step."""

    def gather(self, number: int, rows: slice) -> tuple[torch.Tensor, ...]: ...

    def scatter(self, number: int, start: int, tensors: Sequence[torch.Tensor]) -> None: ...

    def tell(self, *operation: object) -> None: ...


def number_of(entry: KVEntry) -> int:
    """Of an entry in rank 0's cache."""
    assert isinstance(entry, SharedEntry)
    return entry.number


def packed(message: Any) -> bytes:
    data: bytes = msgpack.packb(message)
    return data


def unpacked(data: bytes | bytearray) -> Any:
    return msgpack.unpackb(data, use_list=False)


def windows_said(windows: Sequence[Window]) -> tuple[Any, ...]:
    """Each as its entry's number, its first position, its tokens and how many of them draw."""
    return tuple((number_of(each.entry), each.start, tuple(each.token_ids), each.sample) for each in windows)


def draws_said(rows: Sequence[Rows]) -> tuple[Any, ...]:
    """As much as draws on a device need: no history but its length."""
    return tuple(
        (
            each.params.seed,
            each.params.temperature,
            each.params.top_k,
            each.params.top_p,
            each.params.min_p,
            each.positions.stop - 1,
            each.count,
        )
        for each in rows
    )


def draws_heard(said: Sequence[Any]) -> list[Rows]:
    """Rows that draw as those that `draws_said` spoke of."""
    return [Rows(_params(*params), 0, range(end), count=count) for *params, end, count in said]


@lru_cache(maxsize=1024)
def _params(seed: int | None, temperature: float, top_k: int, top_p: float, min_p: float) -> SamplingParams:
    """A sequence's are the same step after step."""
    return SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def tensors_said(tensors: Sequence[torch.Tensor]) -> list[bytes | memoryview]:
    """Frames: what they are, then the bytes of each. Contiguous, in host memory."""
    what = [(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for each in tensors]
    return [packed(what), *(_bytes(each) for each in tensors)]


def tensors_heard(frames: Sequence[bytearray]) -> list[torch.Tensor]:
    """What `tensors_said` was given, over the frames' own memory."""
    found = []
    for (dtype, shape), data in zip(unpacked(frames[0]), frames[1:], strict=True):
        kind = getattr(torch, dtype)
        whole = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
        found.append(whole.view(shape))
    return found


def _bytes(tensor: torch.Tensor) -> bytes | memoryview:
    if not tensor.numel():
        return b""  # of nothing there is no memory to look at
    data: Any = tensor.contiguous().view(torch.uint8).numpy()
    return memoryview(data).cast("B")
