"""Ranks on machines that are made up of files like the kernel's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from paceline import numa
from paceline.errors import ConfigError
from paceline.numa import Binding, Node, Topology, bindings, node_mask, read_topology

APPLY = """
import threading
from paceline.hardware import usable_cores
from paceline.numa import Binding, apply
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
core = min(__import__("os").sched_getaffinity(0))
apply(Binding(1, (core,), (0,)))
import os
cores = {tuple(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
policy = open("/proc/self/numa_maps").readline().split()[1]
print(cores == {(core,)}, usable_cores(), policy)
"""


@dataclass(frozen=True)
class Machine:
    """`nodes` sockets or parts of them, each of `cores` cores; threads are numbered as on Xeons, siblings last."""

    root: Path
    nodes: int
    cores: int
    smt: bool

    @property
    def threads(self) -> int:
        return self.nodes * self.cores * (2 if self.smt else 1)

    def siblings(self, thread: int) -> str:
        physical = thread % (self.nodes * self.cores)
        return f"{physical},{physical + self.nodes * self.cores}" if self.smt else str(physical)

    def write(self) -> Path:
        for thread in range(self.threads):
            folder = self.root / "cpu" / f"cpu{thread}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(self.siblings(thread) + "\n")
        for node in range(self.nodes):
            folder = self.root / "node" / f"node{node}"
            folder.mkdir(parents=True)
            runs = [self._run(node * self.cores)]
            if self.smt:
                runs.append(self._run((self.nodes + node) * self.cores))
            (folder / "cpulist").write_text(",".join(runs) + "\n")
            (folder / "meminfo").write_text(f"Node {node} MemTotal:  1024 kB\nNode {node} MemFree:  10 kB\n")
        return self.root

    def _run(self, first: int) -> str:
        return f"{first}-{first + self.cores - 1}"


def machine(root: Path, nodes: int, cores: int, *, smt: bool = False, allowed: range | None = None) -> Topology:
    made = Machine(root, nodes, cores, smt)
    return read_topology(made.write(), range(made.threads) if allowed is None else allowed)


def bound(
    topology: Topology, size: int, cores: int | Literal["auto"] = "auto", *, numa_bind: bool = True
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cores and memory of each rank."""
    found = bindings(size, cores_per_rank=cores, numa_bind=numa_bind, topology=topology)
    assert [each.rank for each in found] == list(range(size))
    return [(each.cores, each.nodes) for each in found]


def two_sockets(root: Path) -> Topology:
    return machine(root, 2, 4, smt=True)


def test_a_socket_is_its_cores_with_their_threads_and_its_memory(tmp_path: Path) -> None:
    second = Node(1, ((4, 12), (5, 13), (6, 14), (7, 15)), 2**20)
    assert two_sockets(tmp_path).nodes[1] == second


def test_a_rank_gets_a_socket_with_one_thread_a_core(tmp_path: Path) -> None:
    assert bound(two_sockets(tmp_path), 2) == [((0, 1, 2, 3), (0,)), ((4, 5, 6, 7), (1,))]


def test_one_rank_gets_both_sockets(tmp_path: Path) -> None:
    assert bound(two_sockets(tmp_path), 1) == [((0, 1, 2, 3, 4, 5, 6, 7), (0, 1))]


def test_four_ranks_share_two_sockets_and_stay_within_one(tmp_path: Path) -> None:
    assert bound(two_sockets(tmp_path), 4) == [((0, 1), (0,)), ((2, 3), (0,)), ((4, 5), (1,)), ((6, 7), (1,))]


def test_fewer_cores_a_rank_are_the_first_of_its_socket(tmp_path: Path) -> None:
    assert bound(two_sockets(tmp_path), 2, 3) == [((0, 1, 2), (0,)), ((4, 5, 6), (1,))]


def test_more_cores_than_a_rank_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        bound(two_sockets(tmp_path), 2, 5)
    assert (caught.value.param, caught.value.message) == (
        "engine.cores_per_rank",
        "engine.cores_per_rank is 5, but of 8 cores on 2 NUMA nodes each of 2 ranks can have 4: set at most 4, or auto",
    )


def test_without_numa_binding_memory_comes_from_anywhere(tmp_path: Path) -> None:
    assert bound(two_sockets(tmp_path), 2, numa_bind=False) == [((0, 1, 2, 3), ()), ((4, 5, 6, 7), ())]


@pytest.mark.parametrize("numa_bind", [True, False])
def test_a_binding_knows_whether_it_is_one(tmp_path: Path, numa_bind: bool) -> None:
    found = bindings(2, cores_per_rank="auto", numa_bind=numa_bind, topology=two_sockets(tmp_path))
    assert [each.bound for each in found] == [numa_bind] * 2


def test_two_ranks_get_two_of_four_nodes_each(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 4, 2), 2) == [((0, 1, 2, 3), (0, 1)), ((4, 5, 6, 7), (2, 3))]


def test_three_ranks_get_one_of_four_nodes_each(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 4, 2), 3) == [((0, 1), (0,)), ((2, 3), (1,)), ((4, 5), (2,))]


def test_one_node_is_split_evenly_and_has_no_memory_to_choose(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 1, 8), 2) == [((0, 1, 2, 3), ()), ((4, 5, 6, 7), ())]


def test_cores_that_do_not_divide_give_all_ranks_the_same_number(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 1, 7), 2) == [((0, 1, 2), ()), ((3, 4, 5), ())]


def test_more_ranks_than_cores_share_them(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 1, 2), 4) == [((0,), ()), ((0,), ()), ((1,), ()), ((1,), ())]


def test_a_container_on_one_socket_has_one_node(tmp_path: Path) -> None:
    topology = machine(tmp_path, 2, 4, allowed=range(4, 8))
    assert [node.number for node in topology.nodes] == [1]


def test_ranks_of_a_container_split_the_cores_it_has(tmp_path: Path) -> None:
    assert bound(machine(tmp_path, 2, 4, allowed=range(4, 8)), 2) == [((4, 5), ()), ((6, 7), ())]


def test_a_container_with_few_cores_on_one_socket_splits_them_evenly(tmp_path: Path) -> None:
    """A rank with one core would keep the one with four waiting."""
    topology = machine(tmp_path, 2, 5, allowed=range(6))
    assert bound(topology, 2) == [((0, 1, 2), (0,)), ((3, 4, 5), (0, 1))]


def test_of_a_core_only_threads_that_may_be_used_count(tmp_path: Path) -> None:
    topology = machine(tmp_path, 1, 2, smt=True, allowed=range(1, 4))
    assert topology.nodes[0].cores == ((1, 3), (2,))


def test_a_quota_limits_the_cores_of_all_ranks_together(tmp_path: Path) -> None:
    nodes = two_sockets(tmp_path).nodes
    assert bound(Topology(nodes, quota=5), 2) == [((0, 1), (0,)), ((4, 5), (1,))]


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    assert read_topology(tmp_path, range(3)).nodes == (Node(0, ((0,), (1,), (2,)), 0),)


def test_a_node_of_memory_alone_is_none_of_ours(tmp_path: Path) -> None:
    root = Machine(tmp_path, 2, 2, smt=False).write()
    (root / "node" / "node1" / "cpulist").write_text("\n")
    assert [node.number for node in read_topology(root, range(4)).nodes] == [0]


def test_ten_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert [node.number for node in machine(tmp_path, 11, 1).nodes] == list(range(11))


def test_this_machines_cores_are_those_it_lets_us_use() -> None:
    threads = {thread for node in read_topology().nodes for core in node.cores for thread in core}
    assert threads == os.sched_getaffinity(0)


def test_a_bound_process_uses_its_core_and_memory_in_all_threads() -> None:
    ran = subprocess.run([sys.executable, "-c", APPLY], capture_output=True, text=True, check=True)
    if "rank 1 is not bound" in ran.stderr:
        pytest.skip(ran.stderr)
    assert ran.stdout.split() == ["True", "1", "bind:0"]


def test_a_binding_that_the_system_refuses_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numa, "_pin", lambda *_: None)
    monkeypatch.setattr(numa, "set_memory_policy", refuse)
    with caplog.at_level(logging.WARNING):
        numa.apply(Binding(1, (0,), (0,)))
    assert "rank 1 is not bound to its cores and memory: not permitted" in caplog.text


def refuse(nodes: object) -> None:
    raise OSError("not permitted")


def test_what_is_not_bound_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[object] = []
    monkeypatch.setattr(numa, "_pin", lambda *thread: pinned.append(thread))
    numa.apply(Binding(0, (0,), bound=False))
    assert pinned == []


def test_a_mask_has_a_bit_for_each_node() -> None:
    assert list(node_mask([0, 2])) == [0b101]


def test_a_node_beyond_the_first_word_is_in_the_next() -> None:
    assert list(node_mask([65])) == [0, 0b10]
