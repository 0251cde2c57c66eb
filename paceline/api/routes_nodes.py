"""The HTTP API of the nodes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from paceline.api.body import CheckedRoute
from paceline.api.dependencies import TheGateway
from paceline.api.failures import JSONBytes
from paceline.api.nodes import DEADLINE_S
from paceline.api.schema_nodes import DrainNodeBody, NodeCard, NodeList

nodes_router = APIRouter(route_class=CheckedRoute)


@nodes_router.get("/v1/nodes", response_model=NodeList)
async def list_nodes(gateway: TheGateway) -> Response:
    """The nodes of the cluster, the head first, with the replicas and sessions on each."""
    control = await gateway.node_control()
    found = NodeList(data=[NodeCard.of(each) for each in await control.states()])
    return JSONBytes(found.json_bytes())


@nodes_router.post("/v1/nodes/{node}/drain", response_model=NodeCard)
async def drain_node(node: str, gateway: TheGateway, body: DrainNodeBody | None = None) -> Response:
    """Empty a node, named by its id, address or host name; the answer comes at once. Replicas start elsewhere, those on
    the node end, targets hand their sessions over. Sent again it sets another deadline."""
    wanted = body or DrainNodeBody()
    control = await gateway.node_control()
    deadline_s = DEADLINE_S if wanted.deadline_s is None else wanted.deadline_s
    return JSONBytes(NodeCard.of(await control.drain(node, deadline_s, force=bool(wanted.force))).json_bytes())
