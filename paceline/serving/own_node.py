"""Empties the node of the Ray cluster that this process is on, before whoever runs the host takes it away.

Kubernetes ends a pod for reasons of its own: its machine is emptied, bought back or no longer needed. The pod is told
first, and has a grace period. Here its node drains meanwhile, as over the API, so that its replicas start elsewhere and
its sessions are handed over.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from paceline.errors import Unavailable
from paceline.serving.journal import Readable
from paceline.serving.leaving import read_left

logger = logging.getLogger(__name__)

REPLICA = "SERVE_REPLICA::"
PROXY = "SERVE_PROXY_ACTOR"
"""How the names of Ray Serve's actors begin. A replica's goes on with application, deployment and id."""
POLL_S = 1.0
SILENCE_S = 20.0
"""A cluster that has not answered for so long has ended too, as when all of it is deleted."""
REASON = "its host is taken away"


class Cluster(Readable, Protocol):
    """What is asked of the control store."""

    def nodes(self) -> Mapping[str, Any]: ...

    def draining(self) -> Mapping[str, int]: ...

    def actors(self, node_id: str) -> list[str]: ...

    def drain(self, node_id: str, deadline: float, why: str) -> tuple[bool, str]: ...


def find(nodes: Mapping[str, Any], instance: str | None, host: str) -> str:
    """The id of this process's node: the one that was started as `instance`, or else the only one on `host`.

    Raises Unavailable if there is none, or if that does not say which.
    """
    alive = {node_id: info for node_id, info in nodes.items() if _alive(info)}
    if instance:
        found = [node_id for node_id, info in alive.items() if info.instance_id == instance]
    else:
        found = [node_id for node_id, info in alive.items() if info.node_manager_hostname == host]
    name = instance or host
    if not found:
        raise Unavailable(f"no node {name} in the cluster: it has left already, or never joined")
    if len(found) > 1:
        raise Unavailable(f"{len(found)} nodes are {name}; set RAY_CLOUD_INSTANCE_ID for each of them")
    return found[0]


def leave(
    cluster: Cluster,
    node_id: str,
    deadline: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Drain the node, and return when nothing of Serve is left on it, or at `deadline`, in seconds since 1970.

    `say` hears a line at each change. The head is left alone: the cluster ends with it. Raises Unavailable if Ray
    refuses, or has fallen silent.
    """
    if cluster.nodes()[node_id].is_head_node:
        say("this is the head node, with which the cluster ends: nothing to hand over")
        return
    _drain(cluster, node_id, deadline, clock(), say)
    told, heard = "", clock()
    while clock() < deadline:
        left = _look(cluster, node_id)
        if left is None and clock() - heard >= SILENCE_S:
            raise Unavailable(f"the cluster has not answered for {SILENCE_S:g} s")
        if left == "":
            say("nothing is left here")
            return
        if left is not None:
            heard = clock()
        if left and left != told:
            say(left)
            told = left
        sleep(POLL_S)
    say(f"out of time, {told or 'with no answer of the cluster'}")


def _drain(cluster: Cluster, node_id: str, deadline: float, now: float, say: Callable[[str], None]) -> None:
    """Unless it drains already, and earlier."""
    already = cluster.draining().get(node_id)
    if already is not None and already / 1000 <= deadline:
        say("draining already")
        return
    accepted, why = cluster.drain(node_id, deadline, REASON)
    if not accepted:
        raise Unavailable(f"Ray refuses to drain this node: {why}")
    say(f"draining, for {deadline - now:.0f} s at most")


def _look(cluster: Cluster, node_id: str) -> str | None:
    """What is left on the node, in words; empty if nothing is, None if that cannot be said now."""
    try:
        if not _alive(cluster.nodes()[node_id]):
            return ""
        return left_of(cluster.actors(node_id), cluster)
    except Exception:
        logger.debug("a look at the node failed", exc_info=True)
        return None


def left_of(actors: list[str], store: Readable) -> str:
    """The same, of the names of the actors there: replicas by deployment, their sessions, and the front end."""
    replicas = [name.removeprefix(REPLICA).rsplit("#", 2) for name in actors if name.startswith(REPLICA)]
    proxies = sum(name.startswith(PROXY) for name in actors)
    counts = Counter(deployment.lower() for _, deployment, _ in replicas)
    apps = {app: [replica_id for name, _, replica_id in replicas if name == app] for app, _, _ in replicas}
    sessions = sum(sum(read_left(app, ids, store).values()) for app, ids in apps.items())
    words = [f"{count} {role}" for role, count in sorted(counts.items())]
    words += [f"{sessions} sessions to hand over"] if sessions else []
    words += ["the front end"] if proxies else []
    return "left here: " + ", ".join(words) if words else ""


def _alive(info: Any) -> bool:
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    return bool(info.state == GcsNodeInfo.ALIVE)
