"""Which replica goes when the pool of targets shrinks: of those whose node gains nothing by it, the one that holds the
fewest sessions; what it holds is handed over as it leaves.

Serve has no hook for this. Its scheduler, in the controller, picks from its own books; here its method is wrapped, in
that process alone. Whatever is not as expected leaves the choice to Serve: then more sessions are handed over, and
none is lost.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from paceline.autoscaling.victims import Candidate, order

logger = logging.getLogger("ray.serve")

DEPLOYMENT = "Target"
METHOD = "_get_replicas_to_stop"
ALL = 1 << 30


class SessionsHeld:
    """How many sessions each target replica holds, as it reported last."""

    def __init__(self) -> None:
        self._sessions: Mapping[str, float] = {}

    def put(self, sessions: Mapping[str, float]) -> None:
        self._sessions = dict(sessions)

    def get(self, replica: str) -> float | None:
        return self._sessions.get(replica)


def install(scheduler: type[Any] | None = None) -> SessionsHeld:
    """Have this process's schedulers ask what is returned here. Idempotent."""
    from ray.serve._private.deployment_scheduler import DeploymentScheduler

    kind = DeploymentScheduler if scheduler is None else scheduler
    original = getattr(kind, METHOD, None)
    if original is None:
        logger.warning("this Ray picks the replicas that leave by itself: Paceline has no say in it")
        return SessionsHeld()
    if isinstance(held := getattr(original, "sessions_held", None), SessionsHeld):
        return held
    held = SessionsHeld()
    wrapped = _choosing(original, held)
    wrapped.sessions_held = held  # type: ignore[attr-defined]
    setattr(kind, METHOD, wrapped)
    return held


def _choosing(original: Callable[..., set[Any]], held: SessionsHeld) -> Callable[..., set[Any]]:
    @functools.wraps(original)
    def choose(self: Any, deployment_id: Any, max_num_to_stop: int, *args: Any, **options: Any) -> set[Any]:
        try:
            if deployment_id.name == DEPLOYMENT:
                replicas = original(self, deployment_id, ALL, *args, **options)
                return _fewest_sessions(self, deployment_id, replicas, held, max_num_to_stop)
        except Exception:
            logger.exception("the replicas that leave are picked by Ray Serve")
        return original(self, deployment_id, max_num_to_stop, *args, **options)

    return choose


def _fewest_sessions(
    scheduler: Any, deployment_id: Any, replicas: set[Any], held: SessionsHeld, count: int
) -> set[Any]:
    nodes: Mapping[Any, str] = scheduler._running_replicas[deployment_id]  # from the oldest to the newest
    ages = {replica: age for age, replica in enumerate(nodes)}
    on_node = scheduler._get_node_to_running_replicas()
    by_name = {replica.unique_id: replica for replica in replicas}
    candidates = [
        Candidate(
            name,
            running=replica in nodes,
            on_head=nodes.get(replica) == scheduler._head_node_id,
            node_replicas=len(on_node.get(nodes.get(replica), ())),
            sessions=held.get(name),
            age=ages.get(replica, len(ages)),
        )
        for name, replica in by_name.items()
    ]
    return {by_name[name] for name in order(candidates)[:count]}
