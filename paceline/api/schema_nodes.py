"""What clients send about nodes, and what they are told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from paceline.api.answers import Answer
from paceline.api.fields import Body
from paceline.api.nodes import DEADLINE_S, MAX_DEADLINE_S, NodeState, Phase, Role


class DrainNodeBody(Body):
    """Body of POST /v1/nodes/{node}/drain."""

    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = Field(
        None,
        description="Seconds after which the node is given up with all that is still on it; None is "
        f"{DEADLINE_S:g}. Replicas that find no place elsewhere stay until just before.",
    )
    force: bool | None = Field(
        None, description="Also if its sessions have nowhere to go at the moment, since a node is coming."
    )


class NodeReplica(Answer):
    """A replica on a node; `state` is Ray Serve's word. A STOPPING target has `sessions_left` to hand over."""

    role: Role
    replica_id: str
    state: str
    sessions_left: int


class NodeCard(Answer):
    """A node of the Ray cluster, and what is on it.

    `deadline` is when a node that drains is given up, in seconds since 1970. `sessions` have their KV there, in memory.
    `proxy` is the state of the HTTP and gRPC front end there, if there is one. `empty` is whether nothing of this
    server is left.
    """

    object: Literal["node"] = "node"
    node_id: str
    ip: str
    host: str
    head: bool
    state: Phase
    deadline: float | None = None
    resources: dict[str, float]
    replicas: list[NodeReplica]
    sessions: int
    proxy: str | None = None
    empty: bool

    @classmethod
    def of(cls, found: NodeState) -> NodeCard:
        node = found.node
        replicas = [
            NodeReplica(role=each.role, replica_id=each.replica_id, state=each.state, sessions_left=each.sessions_left)
            for each in found.replicas
        ]
        return cls(
            node_id=node.node_id,
            ip=node.ip,
            host=node.host,
            head=node.head,
            state=node.phase,
            deadline=node.deadline,
            resources=dict(node.resources),
            replicas=replicas,
            sessions=found.sessions,
            proxy=found.proxy,
            empty=found.empty,
        )


class NodeList(Answer):
    object: Literal["list"] = "list"
    data: list[NodeCard]
