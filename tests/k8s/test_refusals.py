"""Wrong values are refused at `helm install`, with the field's name and what to do."""

from __future__ import annotations

from typing import Any

import helm_python
import pytest

from tests.k8s.charts import refusal, render
from tests.k8s.leaves import SCALES, STEPS, nested
from tests.k8s.leaves_shared import REDIS

SCHEMA = [
    ({"modle": "x"}, "at '': additional properties 'modle' not allowed"),
    ({"model": ""}, "at '/model': minLength"),
    ({"target.replica": 2}, "at '/target': additional properties 'replica' not allowed"),
    ({"target.replicas": 0}, "at '/target/replicas': minimum: got 0, want 1"),
    ({"target.replicas": "two"}, "at '/target/replicas': got string, want integer"),
    ({"config.target.engine.max_num_seq": 8}, "at '/config/target/engine': additional properties 'max_num_seq' not"),
    ({"config.sessions.store": "postgres://x"}, "at '/config/sessions/store'"),
    ({"groups.x.role": "targt"}, "at '/groups/x/role': value must be one of 'target', 'draft', 'any'"),
    ({"groups.x.minReplica": 1}, "at '/groups/x': additional properties 'minReplica' not allowed"),
    ({"groups.X": {}}, "at '/groups': additional properties 'X' not allowed"),
    ({"groups.target.spot": "ibm"}, "at '/groups/target/spot': value must be one of"),
    ({"groups.target.rayStartParams.num-cpus": "3"}, "at '/groups/target/rayStartParams/num-cpus': false schema"),
    ({"pods.labels": {"app.kubernetes.io/name": "x"}}, "at '/pods/labels/app.kubernetes.io~1name': false schema"),
    ({"pods.startupProbe.periodSecond": 3}, "at '/pods/startupProbe': additional properties 'periodSecond' not"),
    ({"image.digest": "latest"}, "at '/image/digest'"),
    ({"upgrade.strategy": "Canary"}, "at '/upgrade/strategy': value must be one of"),
    ({"speculation.depth": 17}, "at '/speculation/depth'"),
]
TOGETHER = [
    ({"target.replicas": 3}, "target.replicas: 3 replicas, but groups with role target have room for 1; raise"),
    ({"groups.draft": None}, "draft.replicas: 1 replicas, but groups with role draft have room for 0; raise"),
    (SCALES | {"autoscaling.target.maxReplicas": 9}, "autoscaling.target.maxReplicas: 9 replicas, but groups"),
    (SCALES | {"autoscaling.target.minReplicas": 5}, "autoscaling.target.minReplicas: 5 is more than maxReplicas 4"),
    (SCALES | {"groups.target.minReplicas": 5}, "groups.target.minReplicas: 5 is more than maxReplicas 4; lower it"),
    ({"autoscaling.enabled": True, "draft.enabled": False, "groups.target.maxReplicas": 4}, "draft.enabled: "),
    ({"target.numCpus": 4}, "groups.target.resources.requests.cpu: 1 ranks of a target with target.numCpus 4 do not"),
    ({"target.numGpus": 1}, "groups.target.accelerator.count: 1 ranks of a target with target.numGpus 1 do not fit 0"),
    ({"target.numCpus": 3, "draft.numCpus": 2}, "routers: 1 routers take 0.1 CPUs and replicas leave 0"),
    ({"groups.target.numOfHosts": 2}, "groups.target.numOfHosts: 1 ranks of a target cannot be spread evenly over 2"),
    ({"groups.target.resources.requests.cpu": "many"}, "groups.target.resources.requests.cpu: many is no number"),
    ({"groups.target.cpuSockets": 2}, "groups.target.cpuSockets: 2 sockets, but a pod has 1 ranks"),
    (
        {"groups.target.cpuSockets": 1, "groups.target.resources.requests.cpu": "3500m"},
        "groups.target.resources.requests.cpu: 3500m is no whole number",
    ),
    (
        {"groups.target.cpuSockets": 1, "groups.target.resources.limits.cpu": "4"},
        "groups.target.resources.limits.cpu: with cpuSockets it is requests.cpu (3); leave it out",
    ),
    (
        {"gcsFaultTolerance.enabled": True},
        "gcsFaultTolerance.enabled: it keeps Ray's state in Redis; set redis.enabled",
    ),
    (REDIS | {"redis.host": ""}, "redis.host: "),
    ({"upgrade.strategy": STEPS["upgrade.strategy"]}, "upgrade.strategy: NewClusterWithIncrementalUpgrade needs Ray's"),
    (STEPS | {"upgrade.gatewayClassName": ""}, "upgrade.gatewayClassName: NewClusterWithIncrementalUpgrade needs"),
    (STEPS | {"upgrade.maxSurgePercent": 5}, "upgrade.stepSizePercent: 10 is more than maxSurgePercent 5; lower it"),
    ({"kuberay-operator.install": True}, "kuberay-operator.install: this copy of the chart came without the"),
    ({"config.model": "x"}, "config.model: set by another value"),
    (
        {"config.target.engine.tensor_parallel_size": 2},
        "config.target.engine.tensor_parallel_size: set by another value",
    ),
]


@pytest.mark.parametrize(("values", "message"), SCHEMA, ids=lambda case: case if isinstance(case, str) else "")
def test_by_the_schema(values: dict[str, Any], message: str) -> None:
    assert f"- {message}" in refusal(nested(values))


@pytest.mark.parametrize(("values", "message"), TOGETHER, ids=lambda case: case if isinstance(case, str) else "")
def test_what_does_not_go_together(values: dict[str, Any], message: str) -> None:
    assert f": {message}" in refusal(nested(values))


@pytest.mark.parametrize("name", ["1st", "a.b"])
def test_a_release_name_that_kuberay_does_not_take(name: str) -> None:
    with pytest.raises(helm_python.HelmError, match=r"fullnameOverride: .* is no name for a RayService"):
        render(name=name)


def test_a_message_is_one_line() -> None:
    assert refusal({"target": {"replicas": 3}}).strip().count("\n") == 0
