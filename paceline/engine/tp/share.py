"""One rank's share at work: its runner, its memory, and the entries that rank 0 speaks of by number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from paceline.engine.attention import Window
from paceline.engine.key_shift import KeyShift
from paceline.engine.kv_entry import KVEntry
from paceline.engine.kv_memory import KVMemory
from paceline.engine.runner import Launched, Runner
from paceline.engine.tp.plan import Op, Operation, draws_heard
from paceline.errors import EngineError

Result = torch.Tensor | Launched | int | tuple[torch.Tensor, ...] | None


class Share:
    """Executes operations in their order, as every rank of the replica does with its own share.

    All ranks make theirs at once: how keys move may be found by running the model.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.memories: dict[int, KVMemory] = {}
        self.entries: dict[int, KVEntry] = {}
        self._of_memory: dict[int, int] = {}
        self.key_shift = runner.key_shift()
        self._do: dict[str, Callable[..., Result]] = {
            Op.OPEN: self._open,
            Op.CLOSE: self._close,
            Op.WARM_UP: lambda memory: self.runner.warm_up(self.memories[memory]),
            Op.ENTER: self._enter,
            Op.WIDEN: self._widen,
            Op.TRIM: self._trim,
            Op.DROP: self._drop,
            Op.FORK: self._fork,
            Op.FILL: lambda entry, tokens: self.entries[entry].fill(tokens),
            Op.MOVE: self._move,
            Op.GATHER: lambda entry, first, end: self.entries[entry].taken(slice(first, end)),
            Op.SCATTER: lambda *_: None,  # what is to be written comes behind it: `put`
            Op.RUN: lambda windows: self.runner.run(self._windows(windows)),
            Op.LAUNCH: self._launch,
            Op.COLUMNS: lambda names: self.runner.name_columns(torch.tensor(names)),
        }

    def do(self, operations: Sequence[Operation]) -> Result:
        """What the last of them gives."""
        result: Result = None
        for name, *arguments in operations:
            result = self._do[name](*arguments)
        return result

    def put(self, entry: int, start: int, tensors: Sequence[torch.Tensor]) -> None:
        """This rank's heads of some keys and values."""
        self.entries[entry].put(start, tensors)

    def check(self, memory: int, charged: Mapping[int, int]) -> None:
        """Raise EngineError unless a memory has these entries, each with the room that rank 0 charges."""
        here = {entry: self.entries[entry] for entry, of in self._of_memory.items() if of == memory}
        if {entry: found.charged for entry, found in here.items()} != charged:
            raise EngineError(f"the ranks' account of KV does not close: {len(here)} entries, {len(charged)} expected")
        self.memories[memory].check(list(here.values()))

    def _open(self, memory: int, capacity: int, longest: int, quantized: bool) -> None:
        geometry = self.runner.kv_geometry()
        if quantized:
            geometry = replace(geometry, dtype=torch.int8)
        self.memories[memory] = self.runner.kv_memory(geometry, capacity, longest)

    def _close(self, memory: int) -> None:
        del self.memories[memory]
        for entry in [each for each, of in self._of_memory.items() if of == memory]:
            del self.entries[entry], self._of_memory[entry]

    def _enter(self, memory: int, entry: int, room: int) -> None:
        self.entries[entry] = self.memories[memory].entry(room, None, None)
        self._of_memory[entry] = memory

    def _widen(self, entry: int, room: int, held: int) -> None:
        found = self.entries[entry]
        found.length = held  # what moves along if it moves
        self._memory(entry).widen(found, room)
        found.length, found.charged = 0, max(found.charged, room)

    def _trim(self, entry: int, room: int) -> None:
        found = self.entries[entry]
        self._memory(entry).trim(found, room)
        found.charged = min(found.charged, room)

    def _drop(self, entry: int) -> None:
        self._memory(entry).drop(self.entries.pop(entry))
        del self._of_memory[entry]

    def _fork(self, source: int, entry: int, held: int) -> None:
        self._memory(entry).fork(self.entries[source], self.entries[entry], held)

    def _move(self, entry: int, first: int, end: int, by: int) -> None:
        assert isinstance(self.key_shift, KeyShift)
        self.key_shift.move(self.entries[entry], first, end, by)

    def _launch(self, windows: Sequence[Any], draws: Sequence[Any], feeds: Sequence[int] | None) -> Launched | None:
        return self.runner.launch(self._windows(windows), draws_heard(draws), feeds)

    def _windows(self, said: Sequence[Any]) -> list[Window]:
        """Entries here count no tokens: each window says where it begins."""
        return [Window(self.entries[entry], ids, sample, start) for entry, start, ids, sample in said]

    def _memory(self, entry: int) -> KVMemory:
        return self.memories[self._of_memory[entry]]
