"""Which tokens go into the next forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from paceline.engine.attention import Window
from paceline.engine.kv_cache import KVCache
from paceline.engine.sequence import Sequence

GROWTH = 64
"""Tokens of KV room a sequence is given ahead of need; half of it is more than any verification window."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part of a step: its window, and the candidates at the window's end."""

    sequence: Sequence
    window: Window
    candidates: tuple[int, ...] = ()


@dataclass(slots=True)
class Scheduler:
    """First come, first served. Running streams come before prompts in a step, prompts come in chunks."""

    kv: KVCache
    max_num_seqs: int
    max_batched_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    def admit(self) -> list[Sequence]:
        """Move sequences from waiting to running while there is KV room. Returns those that run for the first time."""
        admitted = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            entry = self.kv.reserve(sequence.tokens, _room_for(sequence), sequence.request.session_id)
            if entry is None:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.entry = entry
            if not sequence.admitted:
                sequence.admitted, sequence.cached_tokens = sequence.clock(), entry.length
                admitted.append(sequence)
        return admitted

    def schedule(self, candidates: Mapping[int, tuple[int, ...]]) -> list[Scheduled]:
        """The next step under the token budget: decode and verification windows, then prefill chunks."""
        self._make_room()
        budget = self.max_batched_tokens
        step = []
        for sequence in _decoding_first(self.running):
            if budget <= 0:
                break
            drafted = candidates.get(sequence.sequence_id, ())[: budget - 1] if sequence.pending == 1 else ()
            start = sequence.kv.length
            chunk = sequence.tokens[start : start + budget]
            complete = len(chunk) == sequence.pending
            window = Window(sequence.kv, (*chunk, *drafted), sample=1 + len(drafted) if complete else 0)
            step.append(Scheduled(sequence, window, drafted))
            budget -= len(window.token_ids)
        return step

    def _make_room(self) -> None:
        """Give every running sequence room to grow; where there is none the youngest yields.

        A preempted sequence keeps its history, goes to the head of the queue and recomputes its KV when it
        runs again; its tokens stay the same.
        """
        for sequence in list(self.running):
            while sequence in self.running and not self._extend(sequence):
                self._preempt(self.running[-1])

    def _extend(self, sequence: Sequence) -> bool:
        """In stretches: on a GPU every extension moves the entry."""
        enough = min(sequence.room, len(sequence.tokens) + GROWTH // 2)
        return sequence.kv.charged >= enough or self.kv.extend(sequence.kv, _room_for(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its KV stays behind as cache."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence.entry is not None:
            self.kv.release(sequence.entry)
            sequence.entry = None


def _room_for(sequence: Sequence) -> int:
    """KV room for what it has and a stretch of what may come, at most what it may ever need."""
    return min(sequence.room, len(sequence.tokens) + GROWTH)


def _decoding_first(running: Iterable[Sequence]) -> list[Sequence]:
    return sorted(running, key=lambda sequence: sequence.pending > 1)
