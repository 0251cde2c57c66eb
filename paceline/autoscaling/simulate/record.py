"""What is kept of a simulation: distributions and sums, by windows of time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paceline.autoscaling.simulate.histogram import BINS, binned
from paceline.autoscaling.simulate.profile import Array, Pace
from paceline.autoscaling.simulate.replicas import Tick

WINDOWS = 720
MANY = 400
"""So many replicas and more are represented by fewer points each: together they are enough."""
FEWER = 6
STRIDE = 7
"""Without a divisor in common with the number of points: long prompts are not those who wait long."""
SERIES = (
    "seconds", "wanted", "running", "leaving", "drafts", "requests", "admitted", "completed", "good", "tokens",
    "prefilled", "waiting", "refused", "sequences", "replica_s", "draft_s",
)  # fmt: skip


@dataclass
class Record:
    """Sums over each window; `wanted`, `running`, `leaving`, `drafts`, `waiting`, `refused` and `sequences` (that run)
    are integrals over time."""

    window_s: float
    sums: Array
    ttft: Array
    itl: Array
    decisions: list[tuple[float, str, int, int, str, str]] = field(default_factory=list)
    """When, pool, before, after, reason, text."""

    def __getitem__(self, name: str) -> Array:
        row: Array = self.sums[SERIES.index(name)]
        return row

    def over_time(self, name: str) -> Array:
        """Mean of an integral, or a sum by second."""
        return self[name] / np.maximum(self["seconds"], 1e-9)


def empty(duration: float, tick: float) -> Record:
    window = max(tick, np.ceil(duration / WINDOWS / tick) * tick)
    windows = int(np.ceil(duration / window)) + 1
    return Record(window, np.zeros((len(SERIES), windows)), np.zeros((windows, BINS)), np.zeros((windows, BINS)))


class Recorder:
    """Adds ticks to a record."""

    def __init__(self, record: Record, pace: Pace, shape: Array, pooled: float, ttft_s: float, itl_s: float) -> None:
        self.record = record
        self._pace = pace
        self._shape = np.sort(shape)
        self._pooled = pooled
        self._spread = float(np.mean(shape**2) / 2)
        self._ttft_s, self._itl_s = ttft_s, itl_s

    def window(self, time: float) -> int:
        last: int = self.record.sums.shape[1] - 1
        return min(int(time / self.record.window_s), last)

    def add(self, time: float, amounts: dict[str, float]) -> None:
        window = self.window(time)
        for name, amount in amounts.items():
            self.record.sums[SERIES.index(name), window] += amount

    def note(self, time: float, done: Tick, replicas: int) -> None:
        """First tokens and steps of a tick, `replicas` of which take requests."""
        window = self.window(time)
        values, weights, place = self._first_tokens(done, replicas)
        self.record.ttft[window] += binned(values, weights)
        good = (values <= self._ttft_s) & (done.itl <= self._itl_s)[place]
        self.add(time, {"good": float(weights[good].sum())})
        chunk = self._pace.chunk_s
        times = np.concatenate([done.step, done.step + chunk]) / np.tile(done.tokens_per_step, 2)
        shares = np.concatenate([(1 - done.chunked) * done.tokens, done.chunked * done.tokens])
        self.record.itl[window] += binned(times, shares)

    def _first_tokens(self, done: Tick, replicas: int) -> tuple[Array, Array, NDArray[np.int64]]:
        """Times to first tokens, their weights and whose they are: wait, half a step, and the prompt's own time.

        The fluid serves parts of a prompt as they come, so that half of its own time is in a wait already.
        """
        some = done.waits.weight > 1e-9
        place, wait, weight = done.waits.place[some], done.waits.wait[some], done.waits.weight[some]
        service = done.prompt[place] / done.prefill_rate[place]
        points = len(self._shape) if replicas < MANY else FEWER
        sizes = self._shape[((np.arange(points) + 0.5) * len(self._shape) / points).astype(int)]
        sizes = sizes / sizes.mean()
        mixed = np.sqrt(1 - 1 / np.maximum(done.mixed[place], 1.0))  # the mean of one prompt is that prompt
        own = (1 + mixed * (sizes[:, None] - 1)) * service
        queue = self._queue(done, place, service, replicas, points)
        values = wait + np.maximum(own / 2, own - wait) + 0.5 * done.itl[place] + np.where(wait > service, 0.0, queue)
        return values.ravel(), np.tile(weight / points, points), np.tile(place, points)

    def _queue(self, done: Tick, place: NDArray[np.int64], service: Array, replicas: int, points: int) -> Array:
        """What the fluid does not know of: prompts that come at random within a tick, in front of each other.

        The mean is Sakasegawa's (1977) for a pool with one queue, but no more than the tick's own requests can bring
        about: what lasts longer is in the fluid. It is spread exponentially.
        """
        use = np.minimum(done.prefill_use[place], 0.97)
        pooled = max(1.0, self._pooled * replicas)
        delayed = use ** (np.sqrt(2 * (pooled + 1)) - 1)
        behind = service * self._spread / (pooled * (1 - use))  # of those who wait at all
        others = np.maximum(done.admitted[place] - 1, 0.0)
        behind = np.minimum(behind, service * np.sqrt(self._spread * others / 2))
        luck = ((np.arange(points) * STRIDE) % points + 0.5) / points
        missed = np.maximum(delayed, 1e-12) / (1 - luck[:, None])
        return np.asarray(behind * np.maximum(np.log(missed), 0.0))
