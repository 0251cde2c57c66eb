"""A cluster that is simulated: arrivals are routed, replicas start and leave, a policy looks at it and decides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.autoscaling.policy import Policy
from paceline.autoscaling.simulate.front import Front
from paceline.autoscaling.simulate.looks import Reporting, drafts_seen, targets_seen
from paceline.autoscaling.simulate.profile import Pace, Profile
from paceline.autoscaling.simulate.record import Record, Recorder, empty
from paceline.autoscaling.simulate.replicas import FIELDS, Coming, Replicas, Tick, nothing
from paceline.autoscaling.simulate.routing import level_out
from paceline.autoscaling.simulate.traces import Arrivals
from paceline.autoscaling.snapshot import Decision, Snapshot
from paceline.sessions.placement import HOLDER_FREE

SESSION_S = 600.0
"""A session is held for so long on average after its last request."""
LOAD_BOUND = 1.5
"""A session's holder with so many times the mean load is passed over, as the router does by default."""
LAST = 0.5
"""A leaving replica with less than so many sequences has done its work: what is left of it goes to the others."""
DRAIN_LIMIT_S = 3600.0
"""So long after the last arrival a simulation ends, whatever still waits."""


@dataclass(frozen=True)
class Conditions:
    """What a policy is run under."""

    profile: Profile
    ttft_s: float
    itl_s: float
    initial: int = 1
    initial_drafts: int = 0
    look_s: float = 1.0
    max_replicas: int = 100
    price: float = 0.25
    seed: int = 0


class Simulation:
    """One policy over one trace."""

    def __init__(self, conditions: Conditions, arrivals: Arrivals, policy: Policy) -> None:
        self._with, self._arrivals, self._policy = conditions, arrivals, policy
        self._dt = arrivals.tick
        self._pace = Pace(conditions.profile)
        self._rng = np.random.default_rng(conditions.seed)
        self.replicas = Replicas(self._pace, self._dt, 2 * conditions.max_replicas + 64)
        self._front = Front(arrivals)
        self._leaving = np.zeros(0, dtype=bool)
        self._starting: list[float] = []
        self._starting_drafts: list[float] = []
        self._drafts = conditions.initial_drafts
        self._served, self._draft_busy = 0.0, 0.0
        self._time = 0.0
        self._reporting = Reporting(
            seats=self._pace.seats(conditions.itl_s),
            prefill_tokens_per_s=conditions.profile.prefill_tokens_per_s,
            kv_tokens=conditions.profile.kv_tokens,
            start_s=conditions.profile.start_s,
            depth=conditions.profile.drafts.depth if conditions.profile.drafts else 0,
        )
        self._enter(max(1, conditions.initial))
        self.record = empty(arrivals.duration, self._dt)
        total = max(arrivals.requests.sum(), 1.0)
        self._follows = float(arrivals.follows.sum() / total)
        self._recorder = Recorder(
            self.record, self._pace, arrivals.shape, 1.0 - self._follows, conditions.ttft_s, conditions.itl_s
        )

    def run(self, on_progress: Callable[[float], None] | None = None) -> Record:
        """All arrivals, and then until everything is done. `on_progress` hears of the share that is done."""
        ticks = len(self._arrivals.requests)
        look = max(1, round(self._with.look_s / self._dt))
        for n in range(ticks):
            self._step(n)
            if n % look == 0:
                self._look()
            if on_progress is not None and n % max(1, ticks // 200) == 0:
                on_progress(n / ticks)
        for _ in range(int(DRAIN_LIMIT_S / self._dt)):
            inside = self.replicas["running"].sum() + self.replicas["waiting"].sum()
            if self._front.waiting + inside < 0.01:
                break
            self._step(None)
        if on_progress is not None:
            on_progress(1.0)
        return self.record

    @property
    def wanted(self) -> int:
        """Targets that are wanted."""
        return int(np.count_nonzero(~self._leaving)) + len(self._starting)

    def _step(self, n: int | None) -> None:
        """One tick; None is one without arrivals."""
        started = [ready for ready in self._starting if ready <= self._time]
        self._starting = [ready for ready in self._starting if ready > self._time]
        self._enter(len(started))
        self._drafts += sum(ready <= self._time for ready in self._starting_drafts)
        self._starting_drafts = [ready for ready in self._starting_drafts if ready > self._time]
        if n is not None:
            self._front.come(n, self._time)
        done = self.replicas.tick(self._route(), self._served)
        self._draft(done)
        self._note(n, done)
        self._depart()
        self._time += self._dt

    def _route(self) -> Coming:
        """What goes to which replica, as far as there is room: to the holders of sessions, else to the least loaded."""
        replicas, open_ = self.replicas, ~self._leaving
        room = np.where(open_, replicas.room, 0.0)
        crowd, refused_s = self._front.take(float(room.sum()), self._time)
        if not crowd.requests:
            return nothing(len(replicas))
        load, sessions = replicas["running"] + replicas["waiting"], replicas["sessions"]
        bound = max(LOAD_BOUND * float(load[open_].mean()), HOLDER_FREE)
        held = float(sessions[open_].sum())
        homes = np.where(open_ & (load < bound), sessions / held, 0.0) if held > 0 else np.zeros(len(replicas))
        home = np.minimum(crowd.follows * homes, room)
        stay = float(home.sum())
        away = level_out(np.where(open_, load + home, np.inf), crowd.requests - stay, room - home)
        long, cached = (tokens / max(crowd.follows, 1e-9) for tokens in (crowd.follow_prompt, crowd.follow_cached))
        other = max(crowd.prompt - stay * long, 0.0) / max(crowd.requests - stay, 1e-9)  # of those that go anywhere
        context = long * home + other * away
        sessions *= math.exp(-self._dt / SESSION_S)
        sessions += away
        output = (crowd.output / crowd.requests) * (home + away)
        return Coming(home + away, np.maximum(context - cached * home, 0.0), context, output, refused_s)

    def _draft(self, done: Tick) -> None:
        """Which share of the drafts that are wanted the drafters can give in the next tick."""
        drafts = self._with.profile.drafts
        if drafts is None:
            return
        asked = float((done.steps * done.wanted).sum()) * drafts.depth * drafts.token_s
        self._served = min(1.0, self._drafts / asked) if asked > 0 else float(self._drafts > 0)
        self._draft_busy = min(1.0, asked / self._drafts) if self._drafts else 0.0

    def _note(self, n: int | None, done: Tick) -> None:
        running = len(self.replicas) - int(self._leaving.sum())
        self._recorder.note(self._time, done, running)
        dt = self._dt
        machines = len(self.replicas) + len(self._starting)
        self._recorder.add(
            self._time,
            {
                "seconds": dt,
                "wanted": dt * self.wanted,
                "running": dt * running,
                "leaving": dt * int(self._leaving.sum()),
                "drafts": dt * self._drafts,
                "requests": 0.0 if n is None else float(self._arrivals.requests[n]),
                "admitted": float(done.admitted.sum()),
                "completed": float(done.completed.sum()),
                "tokens": float(done.tokens.sum()),
                "prefilled": float(done.prefilled.sum()),
                "waiting": dt * (float(self.replicas["waiting"].sum()) + self._front.waiting),
                "sequences": dt * float(self.replicas["busy"].sum()),
                "refused": dt * self._front.waiting,
                "replica_s": dt * machines if n is not None else 0.0,
                "draft_s": dt * (self._drafts + len(self._starting_drafts)) if n is not None else 0.0,
            },
        )

    def _look(self) -> None:
        """What the policy sees, and what comes of it."""
        asked = self._with.profile.drafts
        snapshot = Snapshot(
            now=self._time,
            num_targets=self.wanted,
            num_drafts=self._drafts + len(self._starting_drafts),
            targets=targets_seen(self.replicas, ~self._leaving, self._reporting, self._served),
            drafts=() if asked is None else drafts_seen(self._drafts, self._draft_busy, asked),
            has_drafts=asked is not None,
        )
        decisions = self._policy.decide(snapshot)
        for decision in (decisions.target, decisions.draft):
            if decision.changes:
                self._say(decision)
        self._scale_targets(decisions.target.replicas)
        self._scale_drafts(decisions.draft.replicas)

    def _say(self, decision: Decision) -> None:
        entry = (self._time, decision.pool.value, decision.before, decision.replicas, decision.reason.value)
        self.record.decisions.append((*entry, decision.text))

    def _scale_targets(self, wanted: int) -> None:
        """More are started; of too many those that start go first, then those with the fewest sessions."""
        wanted = min(wanted, self._with.max_replicas)
        more = wanted - self.wanted
        if more > 0:
            profile = self._with.profile
            draws = self._rng.normal(1.0, profile.start_spread, more) if profile.start_spread else np.ones(more)
            self._starting += [self._time + profile.start_s * max(0.2, float(draw)) for draw in draws]
            return
        less = min(-more, len(self._starting))
        if less:
            self._starting = sorted(self._starting)[: len(self._starting) - less]
        serving = np.flatnonzero(~self._leaving)
        less = min(-more - less, len(serving) - 1)
        if less > 0:
            sessions = self.replicas["sessions"]
            victims = serving[np.argsort(sessions[serving], kind="stable")[:less]]
            handed = float(sessions[victims].sum())
            sessions[victims] = 0.0
            self._leaving[victims] = True
            sessions[~self._leaving] += handed / max(1, len(serving) - less)

    def _scale_drafts(self, wanted: int) -> None:
        drafts = self._with.profile.drafts
        if drafts is None:
            return
        more = wanted - self._drafts - len(self._starting_drafts)
        if more > 0:
            self._starting_drafts += [self._time + drafts.start_s] * more
        elif more < 0:
            cancelled = min(-more, len(self._starting_drafts))
            self._starting_drafts = self._starting_drafts[cancelled:]
            self._drafts = max(0, self._drafts + more + cancelled)

    def _enter(self, count: int) -> None:
        if count:
            self.replicas.add(count)
            self._leaving = np.concatenate([self._leaving, np.zeros(count, dtype=bool)])

    def _depart(self) -> None:
        """Those that leave and have done their work are gone."""
        if not self._leaving.any():
            return
        replicas = self.replicas
        gone = self._leaving & (replicas["waiting"] <= 1e-9) & (replicas["running"] < LAST)
        if gone.any():
            held = replicas.keep(~gone)
            self._leaving = self._leaving[~gone]
            least = int(np.argmin(np.where(self._leaving, np.inf, replicas["running"])))
            for name in ("running", "remaining", "kv"):
                replicas[name][least] += held[FIELDS.index(name)]
