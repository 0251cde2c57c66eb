"""Each rule of the operator that is checked here is one that can be broken."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest

from tests.k8s import charts
from tests.k8s.leaves import STEPS, nested
from tests.k8s.operator_rules import violations

HEAD = "spec.rayClusterConfig.headGroupSpec"
GROUP = "spec.rayClusterConfig.workerGroupSpecs.0"
ENV = f"{HEAD}.template.spec.containers.0.env"
INCREMENTAL = "spec.upgradeStrategy.clusterUpgradeOptions"
BROKEN: dict[str, tuple[str, Any]] = {
    "name ": ("metadata.name", "x" * 48),
    "name 1": ("metadata.name", "1st"),
    "initializing-timeout": ("metadata.annotations", {"ray.io/initializing-timeout": "soon"}),
    "rayClusterDeletionDelaySeconds": ("spec.rayClusterDeletionDelaySeconds", -1),
    "rayClusterConfig.upgradeStrategy": ("spec.rayClusterConfig.upgradeStrategy", {"type": "Recreate"}),
    "incremental upgrade: needs the autoscaler": ("spec.rayClusterConfig.enableInTreeAutoscaling", False),
    "incremental upgrade: 0 <= stepSizePercent": (f"{INCREMENTAL}.stepSizePercent", 101),
    "incremental upgrade: intervalSeconds": (f"{INCREMENTAL}.intervalSeconds", 0),
    "incremental upgrade: needs gatewayClassName": (f"{INCREMENTAL}.gatewayClassName", ""),
    "head: needs a container": (f"{HEAD}.template.spec.containers", []),
    "head: resources in both": (f"{HEAD}.rayStartParams", {"num-cpus": "0"}),
    "draft: resources in both": (f"{GROUP}.rayStartParams", {"resources": "{}"}),
    "draft: labels in rayStartParams": (f"{GROUP}.rayStartParams", {"labels": "a=b"}),
    "draft: a label that is none": (f"{GROUP}.labels", {"a": "b c"}),
    "draft: 0 <= minReplicas <= maxReplicas": (f"{GROUP}.minReplicas", 9),
    "draft: only a RayJob suspends": (f"{GROUP}.suspend", True),
    "RAY_enable_autoscaler_v2": (ENV, [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]),
    "autoscalerOptions.idleTimeoutSeconds": ("spec.rayClusterConfig.autoscalerOptions.idleTimeoutSeconds", -1),
    "KUBERAY_GEN_AUTOSCALER_START_CMD": (
        "spec.rayClusterConfig.autoscalerOptions.env",
        [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}],
    ),
    "draft: restartPolicy": (f"{GROUP}.template.spec.restartPolicy", "Always"),
    "draft: idleTimeoutSeconds not negative": (f"{GROUP}.idleTimeoutSeconds", -1),
    "RAY_REDIS_ADDRESS": (ENV, [{"name": "RAY_REDIS_ADDRESS", "value": "r"}]),
    "REDIS_PASSWORD": (ENV, [{"name": "REDIS_PASSWORD", "value": "r"}]),
    "REDIS_USERNAME": (ENV, [{"name": "REDIS_USERNAME", "value": "r"}]),
    "redis-password": (f"{HEAD}.rayStartParams", {"redis-password": "r"}),
    "enableK8sTokenAuth": ("spec.rayClusterConfig.authOptions.enableK8sTokenAuth", True),
    "token authentication": ("spec.rayClusterConfig.rayVersion", "2.51.2"),
    "head: app.kubernetes.io/name": (f"{HEAD}.template.metadata.labels", {"app.kubernetes.io/name": "paceline"}),
    "headService.metadata.name": (f"{HEAD}.headService", {"metadata": {"name": "x"}}),
    "head: a port named serve": (f"{HEAD}.template.spec.containers.0.ports", [{"name": "http", "containerPort": 8000}]),
}


@cache
def service() -> charts.Object:
    """With everything on that a rule is about."""
    return charts.rayservice(nested(STEPS))


def with_field(path: str, value: Any) -> charts.Object:
    changed = copy.deepcopy(service())
    *sections, name = path.split(".")
    at: Any = changed
    for section in sections:
        at = at[int(section)] if isinstance(at, list) else at[section]
    at[name] = value
    return changed


def test_a_rendered_release_breaks_none() -> None:
    assert violations(service()) == []


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    assert [each for each in violations(with_field(*BROKEN[rule])) if each.startswith(rule)]


def test_bounds_are_needed_without_autoscaling() -> None:
    plain = copy.deepcopy(charts.rayservice())
    del charts.groups(plain)["draft"]["minReplicas"]
    assert violations(plain) == ["draft: minReplicas and maxReplicas without autoscaling"]


def test_idle_timeouts_are_for_the_autoscaler() -> None:
    plain = copy.deepcopy(charts.rayservice())
    charts.groups(plain)["draft"]["idleTimeoutSeconds"] = 60
    assert violations(plain) == ["draft: idleTimeoutSeconds and priority under autoscaler v2 alone"]
