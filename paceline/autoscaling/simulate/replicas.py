"""Target replicas as a fluid: how much waits, runs and is done in a tick, for all of them at once.

A replica admits what waits in order, as fast as its prompts are computed and seats and KV allow. What runs makes one
token a step, or more with drafts, and ends at a rate of one in so many tokens as are left on average: the mean of what
runs is right for any distribution of lengths, and requests and tokens are conserved to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.autoscaling.simulate.cohorts import NOBODY, Cohorts, Indices, Waits
from paceline.autoscaling.simulate.profile import Array, Pace

FIELDS = (
    "waiting",
    "queued",
    "context",
    "output",
    "running",
    "remaining",
    "kv",
    "sessions",
    "busy",
    "cadence",
    "capacity",
)
SMOOTHED_S = 5.0
"""What replicas report is of about so many seconds."""
LONG_PROMPT = 3.0
"""The 95th percentile of lognormal prompts, in means."""
REPORTED = (
    "running", "waiting", "queued", "arrived", "prompt", "kv", "itl", "ttft", "steps", "tokens", "wanted", "saved",
)  # fmt: skip


@dataclass(frozen=True)
class Coming:
    """What comes to each replica in a tick: requests, their prompt tokens to compute, whole contexts, outputs."""

    requests: Array
    prompt: Array
    context: Array
    output: Array
    refused_s: float = 0.0
    """How long they had been refused, on average."""


def nothing(replicas: int) -> Coming:
    return Coming(*np.zeros((4, replicas)))


@dataclass(frozen=True)
class Tick:
    """What one tick brought, by replica."""

    waits: Waits
    admitted: Array
    completed: Array
    tokens: Array
    prefilled: Array
    step: Array
    """Seconds of a step without a prompt's chunk."""
    itl: Array
    """Seconds between tokens, mean."""
    chunked: Array
    """Share of the steps with a prompt's chunk."""
    tokens_per_step: Array
    """That a sequence gets."""
    prefill_rate: Array
    """Prompt tokens a second, while sequences decode beside them."""
    prefill_use: Array
    """Share of that rate which was used."""
    prompt: Array
    """Tokens of a prompt, mean."""
    mixed: Array
    """Requests that mean is of."""
    steps: Array
    """A second."""
    wanted: Array
    """Sequences that want drafts."""
    saved: Array
    """Seconds in a second that drafts save."""


class Replicas:
    """State of every replica that runs, in arrays of the same order."""

    def __init__(self, pace: Pace, tick: float, slots: int) -> None:
        self._pace = pace
        self._dt = tick
        self._cohorts = Cohorts(tick, slots)
        self._free = list(range(slots - 1, -1, -1))
        self.now = 0
        self.slot: Indices = np.zeros(0, dtype=np.int64)
        self.number: Indices = np.zeros(0, dtype=np.int64)
        self.state = np.zeros((len(FIELDS), 0))
        self.reported = np.zeros((len(REPORTED), 0))
        self._numbers = 0

    def __len__(self) -> int:
        return len(self.slot)

    def __getitem__(self, name: str) -> Array:
        row: Array = self.state[FIELDS.index(name)]
        return row

    @property
    def room(self) -> Array:
        """Requests each can take in the next tick: its queue has so many places, and some leave it meanwhile."""
        return np.maximum(self._pace.profile.max_queued_requests + self["capacity"] - self["waiting"], 0.0)

    def add(self, count: int) -> None:
        """So many more, empty."""
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self._cohorts.clear(slot)
        self.slot = np.concatenate([self.slot, np.array(slots, dtype=np.int64)])
        self.number = np.concatenate([self.number, np.arange(self._numbers, self._numbers + count)])
        self._numbers += count
        self.state = np.concatenate([self.state, np.zeros((len(FIELDS), count))], axis=1)
        self.reported = np.concatenate([self.reported, np.zeros((len(REPORTED), count))], axis=1)

    def keep(self, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Array:
        """Only those of the mask; returns the sums of what the others held, in order of FIELDS."""
        self._free += [int(slot) for slot in self.slot[~mask]]
        held: Array = self.state[:, ~mask].sum(axis=1)
        self.slot, self.number = self.slot[mask], self.number[mask]
        self.state, self.reported = self.state[:, mask], self.reported[:, mask]
        return held

    def tick(self, coming: Coming, served: float) -> Tick:
        """One tick. `served` is the share of the steps wanting drafts that have them."""
        waiting, queued, contexts, outputs, running, remaining, kv, _, busy, cadence, capacity = self.state
        waiting += coming.requests
        queued += coming.prompt
        contexts += coming.context
        outputs += coming.output
        somebody = np.maximum(waiting, NOBODY)  # a new array: `waiting` changes below
        mean_prompt, mean_output = queued / somebody, outputs / somebody
        plain, step, per_step, wanted = self._steps(busy, served)
        prefill_rate = self._prefill_rate(busy, step)
        capacity[:] = np.minimum(
            prefill_rate * self._dt / np.maximum(mean_prompt, 1.0),
            self._seats(mean_output, contexts / somebody, np.maximum(step, cadence) / per_step),
        )
        share = np.minimum(np.minimum(waiting, capacity) / somebody, 1.0)
        admitted, prefilled, context, output = (share * amount for amount in (waiting, queued, contexts, outputs))
        self.state[:4] = np.maximum(self.state[:4] - np.stack([admitted, prefilled, context, output]), 0.0)

        prefill_share = np.minimum(prefilled / (self._pace.profile.prefill_tokens_per_s * self._dt), 1.0)
        steps = np.maximum((1.0 - prefill_share) / step, 1.0 / (step + self._pace.chunk_s))
        completed, tokens, mean_running = _decode(self._dt, running, remaining, admitted, output, steps * per_step)
        kv[:] = (kv + context + tokens) * running / np.maximum(running + completed, NOBODY)
        busy[:], cadence[:] = mean_running, 1.0 / steps
        waits = self._cohorts.pass_(
            self.now, self.slot, coming.requests, admitted, capacity / self._dt, waiting, coming.refused_s
        )
        self.now += 1
        active = steps * np.minimum(mean_running, 1.0)
        chunks = prefilled / (self._pace.profile.chunk_tokens * steps * self._dt)
        done = Tick(
            waits=waits, admitted=admitted, completed=completed, tokens=tokens, prefilled=prefilled, step=step,
            itl=1.0 / (steps * per_step), chunked=np.minimum(chunks, 1.0), tokens_per_step=per_step,
            prefill_rate=prefill_rate, prefill_use=np.minimum(prefilled / (prefill_rate * self._dt), 1.0),
            prompt=np.maximum(mean_prompt, 1.0), mixed=np.maximum(somebody, coming.requests.sum()), steps=active,
            wanted=wanted * mean_running, saved=active * (plain * per_step - step),
        )  # fmt: skip
        self._smooth(coming, done)
        return done

    def _prefill_rate(self, busy: Array, step: Array) -> Array:
        """Prompt tokens a second: a chunk in every step while anything decodes, else the device's own pace."""
        decoding = -np.expm1(-busy)  # share of the time
        profile = self._pace.profile
        beside = (step + self._pace.chunk_s) / profile.chunk_tokens
        return np.asarray(1.0 / ((1.0 - decoding) / profile.prefill_tokens_per_s + decoding * beside))

    def _steps(self, busy: Array, served: float) -> tuple[Array, Array, Array, Array]:
        """Seconds of a plain step and of the one that runs, tokens a sequence gets from it, and 1 where drafts pay.

        A sequence among on average n others that come at random runs in steps of n + 1.
        """
        running = np.clip(busy + 1.0, 1.0, self._pace.profile.max_num_seqs)
        plain = self._pace.step(running)
        drafts = self._pace.profile.drafts
        if drafts is None:
            return plain, plain, np.ones_like(plain), np.zeros_like(plain)
        verify, gain = self._pace.verify(running), drafts.tokens_per_step
        pays = (gain * plain > verify).astype(float)
        drafted = pays * served
        return plain, plain + drafted * (verify - plain), 1.0 + drafted * (gain - 1.0), pays

    def _seats(self, mean_output: Array, mean_context: Array, token_s: Array) -> Array:
        """Requests that find a seat in the tick: those free, and those that sequences leave. There are no more seats
        than sequences that the KV cache holds.
        """
        running, kv = self["running"], self["kv"]
        left = np.where(running > NOBODY, self["remaining"] / np.maximum(running, NOBODY), mean_output)
        gone = np.maximum(left, 1.0) * token_s
        shrink = np.exp(-self._dt / gone)
        each = np.maximum(kv / np.maximum(running, NOBODY), mean_context) + mean_output / 2
        most = np.minimum(self._pace.profile.max_num_seqs, self._pace.profile.kv_tokens / np.maximum(each, 1.0))
        # n(dt) = in·gone·(1 - shrink) + n·shrink = most, solved for in
        rate = (most - running * shrink) / (gone * (1.0 - shrink))
        return np.maximum(rate, 0.0) * self._dt

    def _smooth(self, coming: Coming, done: Tick) -> None:
        """What replicas report, each of them the mean of about the last seconds."""
        dt = self._dt
        keep = np.exp(-dt / SMOOTHED_S)
        ttft = np.zeros(len(self))
        np.maximum.at(ttft, done.waits.place, np.where(done.waits.weight > NOBODY, done.waits.wait, 0.0))
        ttft += LONG_PROMPT * done.prompt / done.prefill_rate + done.step
        itl = (done.step + np.where(done.chunked > 0.05, self._pace.chunk_s, 0.0)) / done.tokens_per_step
        latest = (
            self["busy"], self["waiting"], self["queued"], coming.requests / dt, coming.prompt / dt, self["kv"], itl,
            ttft, done.steps, done.tokens / dt, done.wanted, done.saved,
        )  # fmt: skip
        self.reported *= keep
        self.reported += (1.0 - keep) * np.stack(latest)


def _decode(
    dt: float, running: Array, remaining: Array, admitted: Array, output: Array, pace: Array
) -> tuple[Array, Array, Array]:
    """Runs sequences for `dt` at `pace` tokens a second, new ones coming evenly; returns how many ended, the tokens
    made, and how many ran on average. Changes `running` and `remaining`, of which the ratio stays.
    """
    whole, tokens_left = running + admitted, remaining + output
    left = np.maximum(tokens_left / np.maximum(whole, NOBODY), 1e-6)
    ending = dt * pace / left
    shrink = np.exp(-ending)
    spread = -np.expm1(-ending) / np.maximum(ending, 1e-12)
    settled = admitted / ending
    stay = settled + (running - settled) * shrink
    mean_running = settled + (running - settled) * spread
    completed = whole - stay
    tokens = np.minimum(completed * left, tokens_left)
    running[:] = stay
    remaining[:] = tokens_left - tokens
    return completed, tokens, mean_running
