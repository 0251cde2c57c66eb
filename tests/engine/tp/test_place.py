"""Which GPU, which cores and how many threads a rank takes."""

from __future__ import annotations

import pytest
import torch

from paceline import numa
from paceline.config import EngineSettings
from paceline.engine.tp import place
from paceline.errors import ConfigError
from paceline.numa import Node, Topology

TWO_SOCKETS = Topology((Node(0, ((0, 8), (1, 9)), 1 << 30), Node(1, ((2, 10), (3, 11)), 1 << 30)))
ONE_NODE = Topology((Node(0, ((0,), (1,), (2,), (3,)), 1 << 30),))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[numa.Binding]:
    """What processes were bound to."""
    found: list[numa.Binding] = []
    monkeypatch.setattr(place.numa, "apply", found.append)
    return found


def on(monkeypatch: pytest.MonkeyPatch, topology: Topology) -> None:
    monkeypatch.setattr(place.numa, "read_topology", lambda: topology)


def settings(**values: object) -> EngineSettings:
    return EngineSettings(**{"device": "cpu", "tensor_parallel_size": 2, **values})  # type: ignore[arg-type]


def test_a_rank_has_a_socket_and_a_thread_for_each_of_its_cores(
    monkeypatch: pytest.MonkeyPatch, bound: list[numa.Binding]
) -> None:
    on(monkeypatch, TWO_SOCKETS)
    found = [place.settled(settings(), rank, ["a", "a"]) for rank in range(2)]
    assert [each.threads for each in found] == [2, 2]
    assert [(each.cores, each.nodes) for each in bound] == [((0, 1), (0,)), ((2, 3), (1,))]


def test_on_one_node_ranks_share_the_cores_and_nobody_is_bound(
    monkeypatch: pytest.MonkeyPatch, bound: list[numa.Binding]
) -> None:
    on(monkeypatch, ONE_NODE)
    assert place.settled(settings(), 1, ["a", "a"]).threads == 2
    assert bound == []


def test_threads_that_are_set_stay(monkeypatch: pytest.MonkeyPatch, bound: list[numa.Binding]) -> None:
    on(monkeypatch, TWO_SOCKETS)
    assert place.settled(settings(threads=7), 0, ["a", "a"]).threads == 7
    assert len(bound) == 1


def test_more_cores_than_a_rank_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, TWO_SOCKETS)
    with pytest.raises(ConfigError, match="cores_per_rank is 3"):
        place.settled(settings(cores_per_rank=3), 0, ["a", "a"])


@pytest.mark.parametrize(
    ("gpus", "where", "expected"), [(4, "aaaa", [0, 1, 2, 3]), (2, "abab", [0, 0, 1, 1]), (1, "ab", [0, 0])]
)
def test_of_a_host_s_ranks_each_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, where: str, expected: list[int]
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in range(len(where)):
        place.settled(EngineSettings(tensor_parallel_size=len(where)), rank, where)
    assert taken == expected
