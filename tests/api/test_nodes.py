"""The calls about nodes, and what is refused of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from paceline.api.nodes import Machines, Node, Nodes, Placed, check_drain, states
from paceline.api.state import SessionInfo
from paceline.errors import NodeConflict
from tests.api.scripted import ScriptedTargets, http
from tests.api.test_keys import ALICE, BOSS, House

HEAD = Node("a1", "10.0.0.1", "head", head=True, resources={"CPU": 4.0}, free={"CPU": 4.0})
FIRST = Node("b2", "10.0.0.2", "first", resources={"CPU": 2.0})
SECOND = Node("c3", "10.0.0.3", "second", resources={"CPU": 2.0})
GONE = Node("d4", "10.0.0.4", "gone", alive=False)
REPLICAS = (
    Placed("router", "router-1", "a1", "RUNNING"),
    Placed("target", "target-1", "b2", "RUNNING"),
    Placed("target", "target-2", "c3", "RUNNING"),
    Placed("draft", "draft-1", "c3", "RUNNING"),
)


class Rack(Nodes):
    """A cluster that does as it is told, and nothing more."""

    def __init__(self, *nodes: Node, replicas: tuple[Placed, ...] = REPLICAS, histories_stay: bool = True) -> None:
        self._stay = histories_stay
        self.machines = Machines(nodes or (FIRST, SECOND, HEAD, GONE), replicas, {"a1": "HEALTHY", "b2": "DRAINING"})

    @property
    def target_needs(self) -> Mapping[str, float]:
        return {"CPU": 2.0}

    @property
    def leaving_s(self) -> float:
        return 33.0

    @property
    def histories_stay(self) -> bool:
        return self._stay

    async def look(self) -> Machines:
        return self.machines

    async def drain(self, node_id: str, deadline: float) -> None:
        nodes = (replace(each, deadline=deadline) if each.node_id == node_id else each for each in self.machines.nodes)
        self.machines = replace(self.machines, nodes=tuple(nodes))


async def listed(rack: Rack, targets: ScriptedTargets | None = None) -> list[dict[str, Any]]:
    async with http(targets, nodes=rack) as client:
        data: list[dict[str, Any]] = (await client.get("/v1/nodes")).json()["data"]
    return data


async def drained(rack: Rack, node: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with http(nodes=rack) as client:
        answer = await client.post(f"/v1/nodes/{node}/drain", json=body)
    return answer.status_code, answer.json()


async def test_the_head_is_listed_first_and_what_is_gone_last() -> None:
    assert [card["host"] for card in await listed(Rack())] == ["head", "first", "second", "gone"]


async def test_a_node_is_told_with_its_replicas_and_sessions() -> None:
    card = (await listed(Rack()))[2]
    assert [(each["role"], each["replica_id"]) for each in card["replicas"]] == [
        ("target", "target-2"),
        ("draft", "draft-1"),
    ]
    assert (card["sessions"], card["state"], card["empty"]) == (1, "running", False)


async def test_a_server_without_nodes_lists_none() -> None:
    async with http() as client:
        assert (await client.get("/v1/nodes")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize("name", ["b2", "10.0.0.2", "first"], ids=["id", "address", "host"])
async def test_a_node_drains_by_its_id_address_or_host_name(name: str) -> None:
    status, card = await drained(Rack(), name, deadline_s=100)
    assert (status, card["node_id"], card["state"]) == (200, "b2", "draining")
    assert 0 < card["deadline"] - time.time() <= 100


async def test_a_drain_needs_no_body() -> None:
    async with http(nodes=Rack()) as client:
        card = (await client.post("/v1/nodes/first/drain")).json()
    assert 500 < card["deadline"] - time.time() <= 600


async def test_a_drain_sent_again_sets_another_deadline() -> None:
    rack = Rack()
    await drained(rack, "first", deadline_s=600)
    status, card = await drained(rack, "first", deadline_s=60)
    assert status == 200
    assert card["deadline"] - time.time() <= 60


@pytest.mark.parametrize(
    ("node", "body", "status", "code", "param"),
    [
        ("nobody", {}, 404, "node_not_found", "node"),
        ("gone", {}, 404, "node_not_found", "node"),
        ("d4", {}, 404, "node_not_found", "node"),
        ("head", {}, 409, "node_conflict", "node"),
        ("head", {"force": True}, 409, "node_conflict", "node"),
        ("first", {"deadline_s": 0}, 400, "invalid_request_error", "deadline_s"),
        ("first", {"deadline_s": -5}, 400, "invalid_request_error", "deadline_s"),
        ("first", {"deadline_s": 40}, 400, "invalid_request_error", "deadline_s"),
        ("first", {"deadline_s": 1e12}, 400, "invalid_request_error", "deadline_s"),
        ("first", {"grace": 1}, 400, "invalid_request_error", "grace"),
    ],
)
async def test_what_cannot_be_drained_is_refused_by_name(
    node: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    found, answer = await drained(Rack(), node, **body)
    assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)


async def test_a_name_of_several_nodes_is_refused_with_their_ids() -> None:
    status, answer = await drained(Rack(HEAD, FIRST, replace(SECOND, host="first")), "first")
    assert (status, answer["error"]["message"]) == (400, "node: 'first' are 2 nodes; give the id of one: b2, c3")


ROUTED = (*REPLICAS, Placed("router", "router-2", "b2", "RUNNING"))


async def test_a_router_s_node_is_not_drained_if_it_keeps_histories_in_memory() -> None:
    status, answer = await drained(Rack(replicas=ROUTED, histories_stay=False), "first")
    assert status == 409
    assert "'first' has a router, and sessions.store is memory" in answer["error"]["message"]


@pytest.mark.parametrize(("stay", "body"), [(True, {}), (False, {"force": True})], ids=["kept elsewhere", "by force"])
async def test_it_is_if_they_are_kept_elsewhere_or_by_force(stay: bool, body: dict[str, Any]) -> None:
    assert (await drained(Rack(replicas=ROUTED, histories_stay=stay), "first", **body))[0] == 200


def alone(*nodes: Node) -> Machines:
    """One target, on the first node."""
    return Machines((FIRST, *nodes), (Placed("target", "target-1", "b2", "RUNNING"),))


@pytest.mark.parametrize(
    "other",
    [
        replace(SECOND, free={"CPU": 1.0}),
        replace(SECOND, free={"CPU": 2.0}, deadline=9.0),
        replace(GONE, free={"CPU": 2.0}),
    ],
    ids=["full", "drains itself", "gone"],
)
def test_the_only_target_s_node_is_not_drained_if_no_other_has_room(other: Node) -> None:
    with pytest.raises(NodeConflict, match=r"first' has the only target replicas, .* \(CPU 2\)"):
        check_drain(FIRST, alone(other), {"CPU": 2.0}, force=False)


def test_it_is_by_force() -> None:
    check_drain(FIRST, alone(), {"CPU": 2.0}, force=True)


def test_it_is_if_another_has_room() -> None:
    check_drain(FIRST, alone(replace(SECOND, free={"CPU": 2.0})), {"CPU": 2.0}, force=False)


def test_a_node_without_targets_is_drained_in_any_case() -> None:
    check_drain(SECOND, alone(SECOND), {"CPU": 2.0}, force=False)


def test_sessions_that_are_still_to_be_handed_over_count() -> None:
    leaving = Placed("target", "target-1", "b2", "STOPPING", sessions_left=3)
    (state,) = states(Machines((FIRST,), (leaving,)), [])
    assert (state.sessions, state.empty) == (3, False)


def test_what_is_on_disk_is_not_held_by_a_node() -> None:
    held = [SessionInfo("s", "target-1", 9, False, 9, "disk"), SessionInfo("t", "target-1", 9, False, 9, "device")]
    (state,) = states(Machines((FIRST,), REPLICAS), held)
    assert state.sessions == 1


@pytest.mark.parametrize(("proxy", "empty"), [(None, True), ("DRAINING", False)])
def test_a_node_is_empty_when_its_front_end_is_gone_too(proxy: str | None, empty: bool) -> None:
    (state,) = states(Machines((FIRST,), (), {} if proxy is None else {"b2": proxy}), [])
    assert state.empty is empty


@pytest.mark.parametrize(("key", "status"), [(ALICE, 403), (BOSS, 200)])
async def test_nodes_need_a_key_with_admin(key: str, status: int) -> None:
    async with House().client(key) as client:
        assert (await client.get("/v1/nodes")).status_code == status
