"""Why no node takes a pod."""

from __future__ import annotations

from decimal import Decimal

import pytest

from paceline.k8s.placing import placing, quantity
from tests.k8s import objects as made

GPU = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
CORDON = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
ROOMY = {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"}


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2", "2"), ("500m", "0.5"), ("1.5", "1.5"), ("2k", "2000"), ("1Gi", "1073741824"), ("1e3", "1000"), ("", "0")],
)
def test_a_quantity_is_read(text: str, amount: str) -> None:
    assert quantity(text) == Decimal(amount)


def test_an_accelerator_that_no_node_has_is_named() -> None:
    found = placing(made.unplaced("w", container=GPU), [made.node("a", cpu="8")])
    assert found == (
        "no node offers nvidia.com/gpu, it asks for 1",
        "add a node with nvidia.com/gpu, or install its device plugin where the hardware is there",
    )


def test_memory_that_no_node_has_is_compared() -> None:
    asks = {"resources": {"requests": {"memory": "64Gi"}}}
    what, _ = placing(
        made.unplaced("w", container=asks), [made.node("a", memory="16Gi"), made.node("b", memory="32Gi")]
    )
    assert what == "it asks for memory 64.0Gi, the largest node has 32.0Gi"


def test_a_label_that_no_node_has_is_named_with_those_there_are() -> None:
    pod = made.unplaced("w", spec={"nodeSelector": {"gpu": "h100"}})
    what, remedy = placing(pod, [made.node("a", {"gpu": "a100"}), made.node("b")])
    assert what == "no node has label gpu=h100 (there is a100)"
    assert remedy.startswith("label one: kubectl label node NAME gpu=h100")


def test_a_taint_that_is_not_tolerated_is_named() -> None:
    what, _ = placing(made.unplaced("w", container=GPU), [made.node("a", taints=(GPU_TAINT,), **ROOMY)])
    assert what == "it does not tolerate taint nvidia.com/gpu=present:NoSchedule"


@pytest.mark.parametrize(
    "toleration",
    [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"},
        {"operator": "Exists"},
    ],
)
def test_a_taint_that_is_tolerated_is_no_reason(toleration: dict[str, str]) -> None:
    pod = made.unplaced("w", container=GPU, spec={"tolerations": [toleration]})
    assert placing(pod, [made.node("a", taints=(GPU_TAINT,), **ROOMY)])[0] == "nodes that could take it are full"


def test_a_node_without_the_taint_is_reason_enough_to_leave_taints_out() -> None:
    nodes = [made.node("a", taints=(GPU_TAINT,), **ROOMY), made.node("b", **ROOMY)]
    assert placing(made.unplaced("w", container=GPU), nodes)[0] == "nodes that could take it are full"


def test_nodes_that_are_cordoned_are_said_to_be() -> None:
    what, remedy = placing(made.unplaced("w"), [made.node("a", taints=(CORDON,))])
    assert (what, remedy) == ("every node it may go to is cordoned", "kubectl uncordon NODE")


def test_without_a_right_to_nodes_what_is_asked_for_is_told() -> None:
    assert placing(made.unplaced("w", container=GPU), None)[0] == "it asks for nvidia.com/gpu 1"


def test_a_cluster_without_nodes_is_told() -> None:
    assert placing(made.unplaced("w"), [])[0] == "the cluster has no node"
