"""Every value of the chart, with another valid one for it.

Most follow from the default's type. OTHER has those that do not; NEEDS what must be set so that a value counts; SILENT
the few that change no object, with the reason.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.k8s import leaves_objects
from tests.k8s.charts import CHART, ROOT, defaults
from tests.k8s.leaves_shared import REDIS, SMALL

PROBE = {"periodSeconds": 7}
OTHER: dict[str, Any] = {
    "apiKeys.metrics": "open",
    "autoscaling.draft.maxReplicas": 3,
    "autoscaling.preset": "latency",
    "autoscaling.resources": SMALL,
    "autoscaling.target.maxReplicas": 3,
    "autoscaling.target.minReplicas": 2,
    "autoscaling.upscalingMode": "Aggressive",
    "config": {"request_timeout_s": 60},
    "draft.numCpus": 0.5,
    "draft.numGpus": 0.5,
    "groupDefaults.accelerator.product": "NVIDIA-L4",
    "groupDefaults.accelerator.productLabel": "cloud.google.com/gke-accelerator",
    "groupDefaults.accelerator.resource": "amd.com/gpu",
    "groupDefaults.resources": SMALL,
    "groupDefaults.role": "draft",
    "groupDefaults.spot": "aks",
    "groups": {"more": {"role": "any"}},
    "head.resources": SMALL,
    "image.digest": f"sha256:{'0' * 64}",
    "image.pullPolicy": "Always",
    "initializingTimeout": "3h",
    "modelCache.mountPath": "/mnt/models",
    **leaves_objects.OTHER,
    "pods.livenessProbe": PROBE,
    "pods.readinessProbe": PROBE,
    "pods.startupProbe": PROBE,
    "pods.affinity": {"podAntiAffinity": {}},
    "pods.env": [{"name": "A", "value": "b"}],
    "pods.envFrom": [{"secretRef": {"name": "s"}}],
    "pods.initContainers": [{"name": "first", "image": "i"}],
    "pods.lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
    "pods.podSecurityContext": {"runAsUser": 2000},
    "pods.securityContext": {"readOnlyRootFilesystem": True},
    "pods.sharedMemory": "2Gi",
    "pods.sidecars": [{"name": "beside", "image": "i"}],
    "pods.tolerations": [{"key": "k", "operator": "Exists"}],
    "pods.topologySpreadConstraints": [{"topologyKey": "z", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
    "pods.volumeMounts": [{"name": "shared-mem", "mountPath": "/mnt/shm"}],
    "pods.volumes": [{"name": "v", "emptyDir": {}}],
    "ray.auth.mode": "disabled",
    "ray.version": "2.61.0",
    "redis.host": "elsewhere",
    "speculation.depth": 4,
    "speculation.maxDepth": 4,
    "target.numCpus": 1.5,
    "target.numGpus": 0.5,
    "upgrade.maxSurgePercent": 50,
    "upgrade.strategy": "None",
}

SCALES = {
    "autoscaling.enabled": True,
    "groups.target.maxReplicas": 4,
    "groups.draft.maxReplicas": 4,
    "groupDefaults.maxReplicas": 4,
}
STEPS = SCALES | {"upgrade.strategy": "NewClusterWithIncrementalUpgrade", "upgrade.gatewayClassName": "istio"}
ROOM = {
    "groups.target.replicasPerPod": 8,
    "groups.draft.replicasPerPod": 8,
    "target.numCpus": 0.1,
    "draft.numCpus": 0.1,
}
ANY = {"groups.any.role": "any"}
NEEDS: dict[str, dict[str, Any]] = {
    "apiKeys.key": {"apiKeys.existingSecret": "keys"},
    "apiKeys.metrics": {"apiKeys.existingSecret": "keys"},
    "autoscaling.draft": SCALES,
    "autoscaling.enabled": SCALES,
    "autoscaling.idleTimeoutSeconds": SCALES,
    "autoscaling.preset": SCALES,
    "autoscaling.resources": SCALES,
    "autoscaling.target": SCALES,
    "autoscaling.upscalingMode": SCALES,
    "draft.numGpus": {"groups.draft.accelerator.count": 1},
    "draft.replicas": ROOM,
    "gcsFaultTolerance.enabled": REDIS,
    "groupDefaults.accelerator": {"groupDefaults.accelerator.count": 1, "groupDefaults.accelerator.product": "T4"},
    "groupDefaults.idleTimeoutSeconds": SCALES,
    "groupDefaults.maxReplicas": SCALES | {"groups.more.role": "any"},
    "groupDefaults.numOfHosts": {"target.tensorParallelSize": 2, "draft.tensorParallelSize": 2, "target.numCpus": 0.5},
    "groupDefaults.priority": SCALES,
    "groupDefaults.replicasPerPod": {"target.numCpus": 0.5, "draft.numCpus": 0.5},
    "groupDefaults.role": {"groups.more.minReplicas": 1},
    "hub.tokenKey": {"hub.existingSecret": "hub"},
    "redis": REDIS,
    **leaves_objects.NEEDS,
    "serviceAccount.name": {},
    "target.numGpus": {"groups.target.accelerator.count": 1},
    "target.replicas": ROOM,
    "target.tensorParallelSize": ROOM,
    "draft.tensorParallelSize": ROOM,
    "upgrade.gatewayClassName": STEPS,
    "upgrade.intervalSeconds": STEPS,
    "upgrade.maxSurgePercent": STEPS,
    "upgrade.stepSizePercent": STEPS,
}
SILENT = {"kuberay-operator.install": "only a packaged chart has the operator: test_package.py"}


@dataclass(frozen=True)
class Leaf:
    """A value, what must be set beside it, and what it is changed to."""

    path: str
    base: dict[str, Any]
    changed: dict[str, Any]


def leaves() -> Iterator[Leaf]:
    read = runpy.run_path(str(ROOT / "helm" / "values_file.py"))["read"]
    for top in read(CHART / "values.yaml"):
        for value in top.leaves():
            path = ".".join(value.path)
            if path not in SILENT:
                base = nested(_needs(path))
                yield Leaf(path, base, _overlaid(base, nested({path: _other(path, value)})))


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted path, as a tree."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return tree


def _needs(path: str) -> dict[str, Any]:
    """Of the value itself, or of the section it is in."""
    sections = (path.rsplit(".", cut)[0] for cut in range(path.count(".") + 1))
    return next((NEEDS[each] for each in sections if each in NEEDS), {})


def _overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _overlaid(out[key], value) if both else value
    return out


def _other(path: str, value: Any) -> Any:
    if path in OTHER:
        return OTHER[path]
    default, needed = value.default, _needs(path).get(path)
    match default if needed is None else needed:
        case bool(now):
            return not now
        case int(now):
            return now + 1
        case str():
            return "other"
        case list():
            return ["other"]
        case dict():
            return {"example.com/other": "other"}
    raise AssertionError(f"{path}: add another value to OTHER")


def all_paths() -> set[str]:
    """Of everything that tables above may name."""

    def walk(tree: Any, at: str) -> Iterator[str]:
        if isinstance(tree, dict):
            for key, each in tree.items():
                yield f"{at}{key}"
                yield from walk(each, f"{at}{key}.")

    return set(walk(defaults(), ""))
