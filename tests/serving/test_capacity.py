"""Whether a replica that is wanted can be started, in one line with the remedy."""

from __future__ import annotations

from paceline.autoscaling.snapshot import Pool
from paceline.config import parse_settings
from paceline.serving.capacity import Capacity, missing

SETTINGS = parse_settings(
    {
        "target": {"num_cpus": 4, "num_gpus": 1},
        "draft": {"num_cpus": 2, "engine": {"tensor_parallel_size": 2}},
    }
)
TARGET = {"CPU": 4.0, "GPU": 1.0}
DRAFT = {"CPU": 2.0}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}
CPU_NODE = {"CPU": 8.0}


def test_what_no_node_has_names_the_setting_to_lower() -> None:
    assert missing(Pool.TARGET, SETTINGS, 1, 0, Capacity((CPU_NODE,), (TARGET,))) == (
        "0 of 1 target replicas run, and one more needs 4 CPUs and 1 GPU: no node of the cluster has that; lower "
        "target.num_gpus or add such nodes"
    )


def test_what_the_autoscaler_cannot_provide_at_all() -> None:
    text = missing(Pool.TARGET, SETTINGS, 2, 1, Capacity((CPU_NODE,), (TARGET,), refused=(TARGET,)))
    assert "no node that the cluster's autoscaler may start has that; lower target.num_cpus and target.num_gpus" in text


def test_an_autoscaler_at_its_limits() -> None:
    text = missing(Pool.TARGET, SETTINGS, 2, 1, Capacity((GPU_NODE,), (TARGET,), refused=(TARGET,)))
    assert "starts no more nodes; raise its limits or lower autoscaling.target.max_replicas" in text


def test_nodes_that_are_full_need_more_nodes() -> None:
    text = missing(Pool.TARGET, SETTINGS, 2, 1, Capacity((GPU_NODE,), (TARGET,)))
    assert text.endswith("every node that has that is full; add nodes or lower autoscaling.target.max_replicas")


def test_what_the_autoscaler_does_not_refuse_is_waited_for() -> None:
    text = missing(Pool.TARGET, SETTINGS, 2, 1, Capacity((CPU_NODE,), (TARGET,), refused=({"CPU": 64.0},)))
    assert text.endswith("waiting for a node")


def test_ranks_are_told_one_by_one() -> None:
    text = missing(Pool.DRAFT, SETTINGS, 1, 0, Capacity(({"CPU": 1.0},), (DRAFT,)))
    assert "needs 2 CPUs for each of 2 ranks: no node of the cluster has that; lower draft.num_cpus" in text


def test_what_no_single_kind_of_node_has_together_names_all_of_it() -> None:
    text = missing(Pool.TARGET, SETTINGS, 1, 0, Capacity(({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}), (TARGET,)))
    assert "lower target.num_cpus and target.num_gpus" in text


def test_a_replica_that_has_its_place_is_starting() -> None:
    assert missing(Pool.TARGET, SETTINGS, 2, 1, Capacity((GPU_NODE,), pending=(DRAFT,))) == ""
