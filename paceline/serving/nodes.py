"""The nodes of the Ray cluster, from its control store and from Serve's controller.

Ray drains a node for whatever reason in one way: nothing new is placed on it, and Serve, which looks at every step,
starts the replicas that are there elsewhere and then ends them gracefully. A node that has become empty ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from paceline.api.nodes import Machines, Node, Nodes, Placed, Role
from paceline.config import AppSettings
from paceline.errors import NodeConflict, Unavailable
from paceline.serving.bundles import bundle
from paceline.serving.control_store import TIMEOUT_S, ControlStore
from paceline.serving.journal import ClusterKeyValue, KeyValue
from paceline.serving.leaving import read_left

logger = logging.getLogger(__name__)

ROLES: Mapping[str, Role] = {"Target": "target", "Draft": "draft", "Router": "router"}
"""By the deployment's name."""
LEAVING = "STOPPING"
REMEMBERED_S = 600.0
"""A node that is gone is told of for so long."""
REASON = "drained over the API"


class RayNodes(Nodes):
    """Of the cluster this process belongs to. `leaving_s` is the longest that a replica of the application may take."""

    def __init__(self, settings: AppSettings, app: str, leaving_s: float, store: KeyValue | None = None) -> None:
        self._settings, self._app, self._leaving_s = settings, app, leaving_s
        self._store = store or ClusterKeyValue()

    @property
    def target_needs(self) -> Mapping[str, float]:
        return bundle(self._settings.target)

    @property
    def leaving_s(self) -> float:
        return self._leaving_s

    @property
    def histories_stay(self) -> bool:
        return self._settings.sessions.store != "memory"

    async def look(self) -> Machines:
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                nodes, details = await asyncio.gather(asyncio.to_thread(_nodes), _serve_details())
                replicas = tuple(placed(details, self._app))
                leaving = [each.replica_id for each in replicas if each.state == LEAVING]
                left = await asyncio.to_thread(read_left, self._app, leaving, self._store)
        except Exception as error:
            logger.warning("the nodes cannot be told", exc_info=True)
            raise Unavailable("the cluster does not say what nodes it has; try again shortly") from error
        told = (with_sessions(each, left) for each in replicas)
        return Machines(nodes, tuple(told), proxies_of(details))

    async def drain(self, node_id: str, deadline: float) -> None:
        try:
            accepted, why = await asyncio.to_thread(_drain, node_id, deadline)
        except Exception as error:
            logger.warning("a node cannot be drained", exc_info=True)
            raise Unavailable("the cluster did not take the request to drain the node; try again shortly") from error
        if not accepted:
            raise NodeConflict(f"node: Ray refuses to drain it: {why}", param="node")


def _store() -> ControlStore:
    return ControlStore(ray.get_runtime_context().gcs_address)


def _nodes() -> tuple[Node, ...]:
    store = _store()
    return nodes_of(store.nodes(), store.draining(), store.free(), time.time())


def _drain(node_id: str, deadline: float) -> tuple[bool, str]:
    return _store().drain(node_id, deadline, REASON)


def nodes_of(
    known: Mapping[str, Any], draining: Mapping[str, int], free: Mapping[str, Mapping[str, float]], now: float
) -> tuple[Node, ...]:
    """From Ray's own records of nodes by id, deadlines in milliseconds, and what is free."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    found = []
    for node_id, info in known.items():
        alive = info.state == GcsNodeInfo.ALIVE
        if not alive and now - info.end_time_ms / 1000 > REMEMBERED_S:
            continue
        deadline = draining.get(node_id)
        found.append(
            Node(
                node_id=node_id,
                ip=info.node_manager_address,
                host=info.node_manager_hostname,
                head=info.is_head_node,
                alive=alive,
                deadline=None if deadline is None or not alive else deadline / 1000,
                resources=_told(info.resources_total),
                free=_told(free.get(node_id, {})),
            )
        )
    return tuple(found)


def _told(resources: Mapping[str, float]) -> dict[str, float]:
    """Without those that only name a node."""
    return {name: amount for name, amount in resources.items() if not name.startswith("node:")}


async def _serve_details() -> dict[str, Any]:
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    details: dict[str, Any] = await controller.get_serve_instance_details.remote()
    return details


def placed(details: Mapping[str, Any], app: str) -> Iterator[Placed]:
    """The replicas of the application that have a node."""
    deployments = details["applications"].get(app, {}).get("deployments", {})
    for name, deployment in deployments.items():
        for each in deployment["replicas"] if name in ROLES else ():
            if each.get("node_id"):  # one that starts has none yet
                yield Placed(ROLES[name], each["replica_id"], each["node_id"], _word(each["state"]))


def with_sessions(replica: Placed, left: Mapping[str, int]) -> Placed:
    """With what it has still to hand over."""
    sessions = left.get(replica.replica_id, 0)
    return Placed(replica.role, replica.replica_id, replica.node_id, replica.state, sessions)


def proxies_of(details: Mapping[str, Any]) -> dict[str, str]:
    """States of Serve's front ends, by node."""
    return {node_id: _word(proxy["status"]) for node_id, proxy in details.get("proxies", {}).items()}


def _word(state: Any) -> str:
    """Of an enumeration, or of what JSON made of it."""
    return str(getattr(state, "value", state))
