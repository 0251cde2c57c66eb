"""The machines behind the server, which of them are to be emptied, and why one is not.

A node that drains gets nothing new. What runs on it is started elsewhere and then ends there, and a target replica that
ends hands its sessions over. How that goes is seen by looking again: the replicas and sessions left on the node.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from paceline.api.prompts import shown
from paceline.api.state import SessionInfo
from paceline.errors import InvalidRequest, NodeConflict, UnknownNode

DEADLINE_S = 600.0
"""How long a node may take by default: a replacement must have been started within it."""
MAX_DEADLINE_S = 7 * 86400.0
START_S = 20.0
"""The least time that replacements have, beyond what a replica may take to leave."""

Role = Literal["target", "draft", "router"]
Phase = Literal["running", "draining", "gone"]


@dataclass(frozen=True, slots=True)
class Node:
    """One of the Ray cluster. `deadline` is set, in seconds since 1970, if it drains.

    `free` is what nobody has reserved of its `resources`.
    """

    node_id: str
    ip: str
    host: str
    head: bool = False
    alive: bool = True
    deadline: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        if not self.alive:
            return "gone"
        return "running" if self.deadline is None else "draining"

    @property
    def open(self) -> bool:
        """Whether something new may come to it."""
        return self.phase == "running"


@dataclass(frozen=True, slots=True)
class Placed:
    """A replica and its node. `state` is Ray Serve's word: RUNNING, STARTING, PENDING_MIGRATION, STOPPING, …

    `sessions_left` is what it has still to hand over, of a target replica that leaves.
    """

    role: Role
    replica_id: str
    node_id: str
    state: str
    sessions_left: int = 0


@dataclass(frozen=True, slots=True)
class Machines:
    """What is known of all of them at one moment. `proxies` has the state of the front end on a node, by its id."""

    nodes: tuple[Node, ...] = ()
    replicas: tuple[Placed, ...] = ()
    proxies: Mapping[str, str] = field(default_factory=dict)


class Nodes(Protocol):
    """The seam to the cluster."""

    @property
    @abstractmethod
    def target_needs(self) -> Mapping[str, float]:
        """Resources of one target replica."""

    @property
    @abstractmethod
    def leaving_s(self) -> float:
        """How long a replica may take to leave."""

    @property
    @abstractmethod
    def histories_stay(self) -> bool:
        """Whether the histories of sessions are kept outside of the routers."""

    @abstractmethod
    async def look(self) -> Machines:
        """Nodes that are, and those that went lately."""

    @abstractmethod
    async def drain(self, node_id: str, deadline: float) -> None:
        """Have it drain until then, in seconds since 1970. A node that drains already gets this deadline."""


class NoNodes(Nodes):
    """Of a server that is one process."""

    @property
    def target_needs(self) -> Mapping[str, float]:
        return {}

    @property
    def leaving_s(self) -> float:
        return 0.0

    @property
    def histories_stay(self) -> bool:
        return True

    async def look(self) -> Machines:
        return Machines()

    async def drain(self, node_id: str, deadline: float) -> None:  # noqa: ARG002  # there is none to drain
        raise _unknown(node_id)


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node with what is on it. `sessions` are those whose KV a target replica holds there, in memory."""

    node: Node
    replicas: tuple[Placed, ...]
    sessions: int
    proxy: str | None

    @property
    def empty(self) -> bool:
        """Nothing of this server runs there any more."""
        return not self.replicas and (self.proxy is None or not self.node.alive)


class NodeControl:
    """What may be asked about nodes, and of them."""

    def __init__(self, nodes: Nodes, held: Sequence[SessionInfo]) -> None:
        self._nodes, self._held = nodes, held

    async def states(self) -> list[NodeState]:
        """Of every node, the head first."""
        return states(await self._nodes.look(), self._held)

    async def drain(self, name: str, deadline_s: float = DEADLINE_S, *, force: bool = False) -> NodeState:
        """Have a node drain; returns at once. `name` is its id, address or host name.

        Raises UnknownNode, NodeConflict if it cannot be drained or only with `force`, InvalidRequest naming the field.
        """
        machines = await self._nodes.look()
        node = find(machines.nodes, name)
        check_deadline(deadline_s, self._nodes.leaving_s)
        check_drain(node, machines, self._nodes.target_needs, force=force)
        if not (force or self._nodes.histories_stay):
            check_histories(node, machines)
        await self._nodes.drain(node.node_id, time.time() + deadline_s)
        return next(each for each in await self.states() if each.node.node_id == node.node_id)


def states(machines: Machines, held: Sequence[SessionInfo]) -> list[NodeState]:
    """Every node with what is on it, the head first."""
    here = {each.replica_id: each.node_id for each in machines.replicas}
    at_hand = [here.get(info.replica_id) for info in held if info.replica_id is not None and info.kv_tier != "disk"]
    found = []
    for node in sorted(machines.nodes, key=lambda node: (not node.alive, not node.head, node.host, node.ip)):
        mine = tuple(each for each in machines.replicas if each.node_id == node.node_id)
        leaving = sum(each.sessions_left for each in mine)
        sessions = at_hand.count(node.node_id) + leaving
        found.append(NodeState(node, mine, sessions, machines.proxies.get(node.node_id)))
    return found


def find(nodes: Sequence[Node], name: str) -> Node:
    """The node of that id, address or host name. Raises UnknownNode; InvalidRequest if there are several."""
    by_id = [node for node in nodes if node.node_id == name]
    found = by_id or [node for node in nodes if node.alive and name in (node.ip, node.host)]
    if not found:
        raise _unknown(name)
    if len(found) > 1:
        ids = ", ".join(node.node_id for node in found)
        raise InvalidRequest(f"node: {shown(name)} are {len(found)} nodes; give the id of one: {ids}", param="node")
    if not found[0].alive:
        raise UnknownNode(f"node: {shown(name)} is gone; there is nothing left to drain", param="node")
    return found[0]


def check_deadline(deadline_s: float, leaving_s: float) -> None:
    """Raise InvalidRequest for a deadline so near that Serve would end replicas before others are there."""
    least = leaving_s + START_S
    if deadline_s < least:
        raise InvalidRequest(
            f"deadline_s: must be at least {least:g}: a replica may take {leaving_s:g} s to leave, and its replacement "
            "must have been started before",
            param="deadline_s",
        )


def check_drain(node: Node, machines: Machines, needs: Mapping[str, float], *, force: bool) -> None:
    """Raise NodeConflict if this node cannot be emptied, or its sessions have nowhere to go and nobody says force."""
    if node.head:
        raise NodeConflict(
            f"node: {shown(node.host)} is the head node: the cluster's own state is there, and it ends with it; drain "
            "the others, or bring up another cluster beside it",
            param="node",
        )
    if force or not _holds_target(node, machines) or _elsewhere(node, machines, needs):
        return
    raise NodeConflict(
        f"node: {shown(node.host)} has the only target replicas, and no other node has room for one "
        f"({_words(needs)}): their sessions would lose their KV; add a node, or say force if one is coming",
        param="node",
    )


def check_histories(node: Node, machines: Machines) -> None:
    """Raise NodeConflict if a router on this node has histories of sessions in its memory."""
    if any(each.role == "router" and each.node_id == node.node_id for each in machines.replicas):
        raise NodeConflict(
            f"node: {shown(node.host)} has a router, and sessions.store is memory: its histories would be lost; set "
            "sessions.store to redis://…, or say force",
            param="node",
        )


def _holds_target(node: Node, machines: Machines) -> bool:
    return any(each.role == "target" and each.node_id == node.node_id for each in machines.replicas)


def _elsewhere(node: Node, machines: Machines, needs: Mapping[str, float]) -> bool:
    """Whether a target runs on another node that stays, or fits on one."""
    others = {each.node_id: each for each in machines.nodes if each.open and each.node_id != node.node_id}
    running = (each for each in machines.replicas if each.role == "target" and each.state == "RUNNING")
    if any(each.node_id in others for each in running):
        return True
    return any(all(each.free.get(name, 0.0) >= much for name, much in needs.items()) for each in others.values())


def _words(needs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in needs.items()) or "no resources"


def _unknown(name: str) -> UnknownNode:
    return UnknownNode(f"node: no node {shown(name)} here; GET /v1/nodes lists them", param="node")
