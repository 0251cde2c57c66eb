"""How long requests wait in a queue that is first come, first served: what arrived in one tick is a cohort."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.autoscaling.simulate.profile import Array

Indices = NDArray[np.int64]
NOBODY = 1e-9


@dataclass(frozen=True)
class Waits:
    """Parts of what was admitted: `weight` requests of the replica at `place` waited `wait` seconds."""

    place: Indices
    wait: Array
    weight: Array


class Cohorts:
    """Queues by slot, a slot being a replica's for its life.

    Within a tick arrivals come evenly and are admitted at an even rate; waits follow from the two.
    """

    def __init__(self, tick: float, slots: int, memory_s: float = 3600.0) -> None:
        self._tick = tick
        self._depth = max(8, int(memory_s / tick))
        self._came = np.zeros((slots, self._depth))
        self._before = np.zeros(self._depth)
        self._head = np.zeros(slots, dtype=np.int64)
        self._left = np.zeros(slots)
        self._backlog = np.zeros(slots, dtype=bool)

    def clear(self, slot: int) -> None:
        self._backlog[slot] = False

    def pass_(
        self, now: int, slots: Indices, came: Array, admitted: Array, rate: Array, waiting: Array, before_s: float
    ) -> Waits:
        """Tick number `now`: who came, how many were admitted, at most at `rate` a second, and how many wait still.

        Those who came had waited elsewhere for `before_s` seconds.
        """
        self._before[now % self._depth] = before_s
        at_once = ~self._backlog[slots] & (waiting <= NOBODY)
        quick, slow = np.flatnonzero(at_once), np.flatnonzero(~at_once)
        parts = [(quick, np.full(len(quick), before_s), admitted[quick])]
        if len(slow):
            self._join(now, slots[slow], came[slow])
            parts += self._leave(now, slots[slow], slow, admitted[slow], rate[slow])
            self._backlog[slots[slow]] = waiting[slow] > NOBODY
        place, wait, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Waits(place, wait, weight)

    def _join(self, now: int, slots: Indices, came: Array) -> None:
        fresh = ~self._backlog[slots]
        self._head[slots[fresh]], self._left[slots[fresh]] = now, came[fresh]
        self._came[slots, now % self._depth] = came
        lost = now - self._head[slots] >= self._depth  # older than is remembered: its wait is what is remembered
        self._head[slots[lost]] += 1
        self._left[slots[lost]] += self._came[slots[lost], self._head[slots[lost]] % self._depth]

    def _leave(
        self, now: int, slots: Indices, place: Indices, admitted: Array, rate: Array
    ) -> list[tuple[Indices, Array, Array]]:
        parts = []
        rest, done = admitted.copy(), np.zeros(len(slots))
        active = np.arange(len(slots))
        while len(active):
            mine = slots[active]
            head, left = self._head[mine], self._left[mine]
            take = np.minimum(left, rest[active])
            whole = np.maximum(self._came[mine, head % self._depth], left)
            came = head + (whole - left + take / 2) / np.maximum(whole, NOBODY)
            leaves = now * self._tick + (done[active] + take / 2) / np.maximum(rate[active], NOBODY)
            before = self._before[head % self._depth]
            parts.append((place[active], np.maximum(leaves - came * self._tick, 0.0) + before, take))
            rest[active] -= take
            done[active] += take
            self._left[mine] = left - take
            over = (self._left[mine] <= NOBODY) & (head < now)
            self._head[mine[over]] += 1
            self._left[mine[over]] = self._came[mine[over], self._head[mine[over]] % self._depth]
            active = active[over & (rest[active] > NOBODY)]
        return parts
