"""The policy at work in Serve's controller: contexts of Ray Serve in, numbers of replicas out.

    contexts ─► snapshot ─► policy ─► journal ─► {deployment: replicas}

Serve asks ten times a second; the policy looks once an `interval_s`, and what it said last holds in between. Whatever
goes wrong, a policy that raises, a replica that reports nothing, a clock that jumps, leaves the pools as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from paceline.autoscaling.policy import Policy
from paceline.autoscaling.presets import resolved
from paceline.autoscaling.snapshot import Decisions, DraftLoad, Pool, Snapshot, TargetLoad
from paceline.config import AppSettings, AutoscalingSettings, parse_settings
from paceline.serving.capacity import Capacity, cluster_capacity, missing
from paceline.serving.journal import Journal

logger = logging.getLogger("ray.serve")

STALE_S = 30.0
"""A replica that has reported nothing new for so long is not known any more."""
WAITING_S = 30.0
"""A replica that is wanted for so long and does not run is reported."""

POOLS = {"Target": Pool.TARGET, "Draft": Pool.DRAFT}
"""Of deployments; others are not scaled."""

Contexts = Mapping[Any, Any]
"""Ray Serve's `AutoscalingContext` by `DeploymentID`."""


class Scaling:
    """One application's. `on_sessions` hears how many sessions each target replica holds. `clock` counts seconds and
    never goes back."""

    def __init__(
        self,
        make_policy: Callable[[AutoscalingSettings], Policy],
        journal: Callable[[str], Journal],
        *,
        on_sessions: Callable[[Mapping[str, float]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        capacity: Callable[[], Capacity] = cluster_capacity,
    ) -> None:
        self._make_policy, self._open_journal = make_policy, journal
        self._on_sessions = on_sessions
        self._clock, self._capacity = clock, capacity
        self._args: Mapping[str, Any] | None = None
        self._settings = AppSettings()
        self._policy: Policy | None = None
        self._journal: Journal | None = None
        self._reports = _Reports()
        self._short_since: dict[Pool, float] = {}
        self._wants: dict[Pool, int] = {}
        self._due = float("-inf")

    def decide(self, contexts: Contexts) -> dict[Any, int]:
        """Replicas of each deployment that is one of the pools. Never raises."""
        pools = {POOLS[context.deployment_name]: each for each, context in contexts.items() if _scaled(context)}
        if Pool.TARGET not in pools:
            return {}
        known = {pool: contexts[each] for pool, each in pools.items()}
        now = self._clock()
        if now >= self._due or known.keys() - self._wants.keys():
            self._wants = self._look(known, now)
            self._due = now + self._settings.autoscaling.interval_s
        return {pools[pool]: wants for pool, wants in self._wants.items() if pool in pools}

    def _look(self, pools: Mapping[Pool, Any], now: float) -> dict[Pool, int]:
        """What is wanted from now on; what is wanted already if anything fails."""
        held = {pool: int(context.target_num_replicas) for pool, context in pools.items()}
        try:
            journal = self._journal = self._journal or self._open_journal(pools[Pool.TARGET].app_name)
            policy = self._current_policy(pools[Pool.TARGET])
        except Exception:
            logger.exception("autoscaling: cannot begin; every pool stays as it is")
            return held
        try:
            seen = self._snapshot(pools, now)
            self._on_sessions({each.replica: each.sessions for each in seen.targets if each.sessions is not None})
            decisions = policy.decide(seen)
            wants = {decision.pool: max(0, int(decision.replicas)) for decision in (decisions.target, decisions.draft)}
        except Exception as error:
            journal.note_error(error)
            return held
        self._tell(journal, decisions, pools, now)
        return {pool: wants[pool] for pool in pools}

    def _current_policy(self, context: Any) -> Policy:
        """Made anew when the settings changed, which come with the deployment."""
        args = context.config.policy.policy_kwargs
        if self._policy is None or args != self._args:
            self._settings = settings = parse_settings(args)
            self._policy = self._make_policy(resolved(settings.autoscaling, cpu=settings.target.on_cpu))
            self._args = args
        return self._policy

    def _snapshot(self, pools: Mapping[Pool, Any], now: float) -> Snapshot:
        target, draft = pools[Pool.TARGET], pools.get(Pool.DRAFT)
        return Snapshot(
            now,
            int(target.target_num_replicas),
            0 if draft is None else int(draft.target_num_replicas),
            tuple(TargetLoad.of(name, numbers) for name, numbers in self._reports.fresh(target, now)),
            () if draft is None else tuple(DraftLoad.of(name, each) for name, each in self._reports.fresh(draft, now)),
            has_drafts=draft is not None,
        )

    def _tell(self, journal: Journal, decisions: Decisions, pools: Mapping[Pool, Any], now: float) -> None:
        running = {pool: int(context.current_num_replicas) for pool, context in pools.items()}
        try:
            journal.note(decisions, running, self._waiting(pools, running, now))
        except Exception:
            logger.exception("autoscaling: the decisions cannot be told")

    def _waiting(self, pools: Mapping[Pool, Any], running: Mapping[Pool, int], now: float) -> tuple[str, ...]:
        """Why replicas that have been wanted for long do not run."""
        short = {pool for pool, context in pools.items() if running[pool] < context.target_num_replicas}
        self._short_since = {pool: self._short_since.get(pool, now) for pool in short}
        long = [pool for pool, since in self._short_since.items() if now - since >= WAITING_S]
        if not long:
            return ()
        capacity = self._capacity()
        wanted = {pool: int(pools[pool].target_num_replicas) for pool in sorted(long)}
        told = (missing(pool, self._settings, count, running[pool], capacity) for pool, count in wanted.items())
        return tuple(text for text in told if text)


class _Reports:
    """What replicas reported last, and since when each has said nothing new."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}

    def fresh(self, context: Any, now: float) -> list[tuple[str, dict[str, float]]]:
        """(replica, numbers) of the running replicas of a deployment that report.

        A series has a point for each look a replica took at itself; only the last look counts. Its time is of the
        replica's clock and only compared with itself.
        """
        numbers: dict[str, dict[str, float]] = {}
        times: dict[str, float] = {}
        for name, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if not series:
                    continue
                last, key = series[-1], replica.unique_id
                if last.timestamp > times.get(key, float("-inf")):
                    times[key], numbers[key] = last.timestamp, {}
                if last.timestamp == times[key]:
                    numbers[key][name] = last.value
        return [(key, numbers[key]) for key, moment in times.items() if self._is_fresh(key, moment, now)]

    def _is_fresh(self, key: str, moment: float, now: float) -> bool:
        before, since = self._seen.get(key, (None, now))
        if moment != before:
            since = now
        self._seen[key] = (moment, since)
        return now - since < STALE_S


def _scaled(context: Any) -> bool:
    return context.deployment_name in POOLS
