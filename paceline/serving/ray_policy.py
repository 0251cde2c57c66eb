"""Ray Serve's own autoscaling behind our interface, to compare ours with.

It is Ray's code: the default policy, its scaling factors and delays as `AutoscalingConfig` has them, and its mean of
the requests over `look_back_period_s`. Its metrics are of the moment, where Serve has them pushed every ten seconds.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from paceline.autoscaling.policy import Policy
from paceline.autoscaling.snapshot import Decision, Decisions, Pool, Reason, Snapshot

DEPLOYMENT = DeploymentID(name="target", app_name="simulated")


class RayQueueLength(Policy):
    """`replica_queue_length_autoscaling_policy`; drafters stay as they are, for Ray sees no requests of theirs."""

    def __init__(self, target_ongoing_requests: float, min_replicas: int, max_replicas: int, **settings: Any) -> None:
        self._config = AutoscalingConfig(
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            target_ongoing_requests=target_ongoing_requests,
            **settings,
        )
        self._state: dict[str, Any] = {}
        self._ongoing: deque[tuple[float, float]] = deque()

    def decide(self, seen: Snapshot) -> Decisions:
        ongoing = self._look_back(seen.now, sum((load.running or 0.0) + (load.waiting or 0.0) for load in seen.targets))
        context = self._context(seen, ongoing)
        desired, _ = replica_queue_length_autoscaling_policy(context)
        desired = max(0, _apply_scaling_factors(desired, context.current_num_replicas, self._config))
        # as Serve's wrapper does, which has no clock but the machine's
        wanted, self._state = _apply_delay_logic(desired, seen.num_targets, self._config, self._state, seen.now)
        replicas = min(max(wanted, self._config.min_replicas), self._config.max_replicas)
        text = (
            f"{ongoing:.4g} requests on {len(seen.targets)} replicas, {self._config.target_ongoing_requests:g} wanted"
        )
        return Decisions(
            Decision(Pool.TARGET, seen.num_targets, replicas, Reason.SEATS, f"{text}: {replicas}"),
            Decision(Pool.DRAFT, seen.num_drafts, seen.num_drafts, Reason.STEADY, "as they are"),
        )

    def _look_back(self, now: float, ongoing: float) -> float:
        """Mean over the period, weighed by time, as Serve aggregates it."""
        self._ongoing.append((now, ongoing))
        while now - self._ongoing[0][0] > self._config.look_back_period_s:
            self._ongoing.popleft()
        if len(self._ongoing) == 1:
            return ongoing
        area = sum(before[1] * (after[0] - before[0]) for before, after in pairwise(self._ongoing))
        return area / (now - self._ongoing[0][0])

    def _context(self, seen: Snapshot, ongoing: float) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name=DEPLOYMENT.name,
            app_name=DEPLOYMENT.app_name,
            current_num_replicas=len(seen.targets),
            target_num_replicas=seen.num_targets,
            running_replicas=[],
            total_num_requests=ongoing,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=seen.now,
            config=self._config,
        )
