"""A node that is taken away is emptied first, in the time there is: against a control store that is scripted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.constants import SERVE_PROXY_NAME

from paceline.errors import Unavailable
from paceline.serving.own_node import PROXY, find, leave, left_of


def node(instance: str = "pod", host: str = "host", *, alive: bool = True, head: bool = False) -> GcsNodeInfo:
    state = GcsNodeInfo.ALIVE if alive else GcsNodeInfo.DEAD
    return GcsNodeInfo(instance_id=instance, node_manager_hostname=host, state=state, is_head_node=head)


def replica(deployment: str, name: str = "r1") -> str:
    return ReplicaID(name, deployment_id=DeploymentID(deployment, "paceline")).to_full_id_str()


TARGET, ROUTER, FRONT = replica("Target"), replica("Router", "r2"), f"{SERVE_PROXY_NAME}-abc"


@dataclass
class Scripted:
    """A cluster of this node, which a second changes as `scenes` say; the last of them stays."""

    scenes: list[list[str] | Exception]
    me: GcsNodeInfo = field(default_factory=node)
    deadlines: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    now: float = 1000.0
    keys: dict[str, bytes] = field(default_factory=dict)
    drained: list[tuple[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def nodes(self) -> dict[str, GcsNodeInfo]:
        return {"me": self.me}

    def draining(self) -> dict[str, int]:
        return self.deadlines

    def actors(self, node_id: str) -> list[str]:
        assert node_id == "me"
        scene = self.scenes[min(int(self.now - 1000), len(self.scenes) - 1)]
        if isinstance(scene, Exception):
            raise scene
        return scene

    def drain(self, node_id: str, deadline: float, why: str) -> tuple[bool, str]:
        assert why
        self.drained.append((node_id, deadline))
        return not self.refusal, self.refusal

    def get(self, key: str) -> bytes | None:
        return self.keys.get(key)

    def leave(self, deadline: float = 1060.0) -> list[str]:
        leave(self, "me", deadline, self.said.append, clock=lambda: self.now, sleep=self._sleep)
        return self.said

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_node_drains_until_the_deadline() -> None:
    cluster = Scripted([[]])
    cluster.leave(1042.0)
    assert cluster.drained == [("me", 1042.0)]


def test_each_change_is_a_line_until_nothing_is_left() -> None:
    cluster = Scripted([[TARGET, ROUTER, FRONT], [TARGET, ROUTER, FRONT], [FRONT], []])
    assert cluster.leave() == [
        "draining, for 60 s at most",
        "left here: 1 router, 1 target, the front end",
        "left here: the front end",
        "nothing is left here",
    ]


def test_it_returns_as_soon_as_nothing_is_left() -> None:
    cluster = Scripted([[TARGET], [TARGET], []])
    cluster.leave()
    assert cluster.now == 1002.0


def test_at_the_deadline_it_says_what_is_left() -> None:
    cluster = Scripted([[TARGET]])
    assert cluster.leave()[-1] == "out of time, left here: 1 target"
    assert cluster.now == 1060.0


def test_a_node_that_drains_already_is_waited_for() -> None:
    cluster = Scripted([[TARGET], []], deadlines={"me": 1_050_000})
    assert cluster.leave()[0] == "draining already"
    assert cluster.drained == []


def test_a_later_deadline_is_brought_forward() -> None:
    cluster = Scripted([[]], deadlines={"me": 1_600_000})
    cluster.leave(1060.0)
    assert cluster.drained == [("me", 1060.0)]


def test_the_head_is_left_alone() -> None:
    cluster = Scripted([[TARGET]], me=node(head=True))
    assert "head node" in cluster.leave()[0]
    assert cluster.drained == []


def test_a_node_that_ended_by_itself_has_nothing_left() -> None:
    cluster = Scripted([[TARGET]], me=node(alive=False))
    assert cluster.leave()[-1] == "nothing is left here"


def test_a_look_that_fails_is_not_the_end() -> None:
    cluster = Scripted([TimeoutError(), [TARGET], TimeoutError(), [TARGET], []])
    assert cluster.leave()[1:] == ["left here: 1 target", "nothing is left here"]


def test_a_cluster_that_has_fallen_silent_is_not_waited_for() -> None:
    cluster = Scripted([[TARGET], TimeoutError()])
    with pytest.raises(Unavailable, match="has not answered for 20 s"):
        cluster.leave()
    assert cluster.now == 1020.0


def test_a_refusal_is_told() -> None:
    with pytest.raises(Unavailable, match="refuses to drain this node: too young"):
        Scripted([[]], refusal="too young").leave()


def test_sessions_that_are_still_to_be_handed_over_are_told() -> None:
    store = Scripted([[]], keys={"leaving/paceline/r1": b"7"})
    assert left_of([TARGET], store) == "left here: 1 target, 7 sessions to hand over"


def test_actors_that_are_not_of_serve_are_nothing_to_wait_for() -> None:
    assert left_of(["", "paceline-rank-1"], Scripted([[]])) == ""


def test_serves_front_end_is_known_by_its_name() -> None:
    assert PROXY == SERVE_PROXY_NAME


def test_a_node_is_found_by_the_name_it_was_started_under() -> None:
    assert find({"a": node("x"), "b": node("y")}, "y", "host") == "b"


def test_a_node_without_such_a_name_is_found_by_its_host() -> None:
    assert find({"a": node(host="one"), "b": node(host="two")}, None, "two") == "b"


def test_a_node_that_is_gone_is_not_found() -> None:
    with pytest.raises(Unavailable, match="no node x in the cluster"):
        find({"a": node("x", alive=False)}, "x", "host")


def test_of_several_nodes_on_one_host_none_is_guessed() -> None:
    with pytest.raises(Unavailable, match="2 nodes are host; set RAY_CLOUD_INSTANCE_ID"):
        find({"a": node("x"), "b": node("y")}, None, "host")
