"""Replicas step by step and request by request: what the fluid is measured against."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from paceline.autoscaling.simulate.profile import Pace, Profile
from paceline.autoscaling.simulate.traces import Requests


@dataclass
class Sequence:
    came: float
    prompt: float
    left: float


@dataclass
class Replica:
    """Prompts in order, a chunk of them beside the tokens of those that decode."""

    pace: Pace
    now: float = 0.0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    sequence_seconds: float = 0.0
    tokens: float = 0.0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def run_until(self, moment: float) -> None:
        while self.now < moment:
            if not self.load:
                self.now = max(self.now, moment) if moment < float("inf") else self.now
                return
            self.step()

    def step(self) -> None:
        profile = self.pace.profile
        room = float(profile.chunk_tokens) if self.running else 4.0 * profile.chunk_tokens
        seats = profile.max_num_seqs - len(self.running)
        computed, ready = 0.0, []
        while self.waiting and len(ready) < seats and computed < room:
            first = self.waiting[0]
            part = min(first.prompt, room - computed)
            first.prompt -= part
            computed += part
            if first.prompt > 0:
                break
            ready.append(self.waiting.popleft())
        took = computed / profile.prefill_tokens_per_s
        if self.running:
            took += float(self.pace.step(np.array([float(len(self.running))]))[0])
        self.now += took
        self.sequence_seconds += took * len(self.running)
        self.tokens += len(self.running)
        for sequence in self.running:
            sequence.left -= 1
        self.running = [sequence for sequence in self.running if sequence.left > 0]
        self.first_tokens += [self.now - sequence.came for sequence in ready]
        self.running += ready


@dataclass(frozen=True)
class Outcome:
    first_tokens: np.ndarray[tuple[int], np.dtype[np.float64]]
    mean_running: float
    tokens: float


def simulate(profile: Profile, requests: Requests, replicas: int) -> Outcome:
    """Each request goes to the replica with the fewest; one token is of the prompt's own step."""
    pool = [Replica(Pace(profile)) for _ in range(replicas)]
    for t, prompt, output in zip(requests.t, requests.prompt, requests.output, strict=True):
        for replica in pool:
            replica.run_until(float(t))
        least = min(pool, key=lambda replica: replica.load)
        least.waiting.append(Sequence(float(t), float(prompt), float(output)))
    for replica in pool:
        replica.run_until(float("inf"))
    end = max(float(requests.t[-1]), 1.0)
    return Outcome(
        first_tokens=np.array([each for replica in pool for each in replica.first_tokens]),
        mean_running=sum(replica.sequence_seconds for replica in pool) / end,
        tokens=sum(replica.tokens for replica in pool),
    )
