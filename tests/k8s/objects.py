"""Objects as an API server has them, for tests that need no server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from paceline.k8s.kinds import Obj
from paceline.k8s.snapshot import Snapshot

NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: bool, reason: str = "", message: str = "") -> Obj:
    return {"type": kind, "status": "True" if status else "False", "reason": reason, "message": message}


def service(*conditions: Obj, generation: int = 1, made: float = 5.0, **status: Any) -> Obj:
    """A RayService whose operator has seen it, unless `observedGeneration` says otherwise."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "paceline", "generation": generation, "creationTimestamp": ago(made)},
        "status": {"observedGeneration": generation, "conditions": list(conditions), **status},
    }


def apps(status: str, message: str = "", **deployments: Obj) -> Obj:
    """Serve's part of a status."""
    return {
        "applicationStatuses": {
            "paceline": {"status": status, "message": message, "serveDeploymentStatuses": deployments}
        }
    }


def pod(name: str, group: str = "target", *, conditions: tuple[Obj, ...] = (), **more: Any) -> Obj:
    """A Ray pod; `status` and `spec` add to what it has."""
    status: Obj = {"phase": "Pending", "conditions": list(conditions), **more.pop("status", {})}
    spec = {"containers": [{"name": "ray", "image": "paceline:1", **more.pop("container", {})}], **more.pop("spec", {})}
    labels = {
        "ray.io/cluster": "paceline-abc",
        "ray.io/group": "headgroup" if group == "head" else group,
        "ray.io/node-type": "head" if group == "head" else "worker",
    }
    metadata = {"name": name, "labels": labels, "creationTimestamp": ago(60), **more}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def placed(name: str, group: str = "target", **more: Any) -> Obj:
    """A pod that has a node."""
    return pod(name, group, conditions=(condition("PodScheduled", True), condition("Ready", False)), **more)


def running(name: str, group: str = "target") -> Obj:
    found = pod(name, group, conditions=(condition("PodScheduled", True), condition("Ready", True)))
    found["status"]["phase"] = "Running"
    return found


def unplaced(name: str, group: str = "target", message: str = "0/2 nodes are available.", **more: Any) -> Obj:
    return pod(name, group, conditions=(condition("PodScheduled", False, "Unschedulable", message),), **more)


def container(state: Obj, *, name: str = "ray", restarts: int = 0, last: Obj | None = None) -> Obj:
    """A container's status."""
    found = {"name": name, "image": "paceline:1", "ready": False, "restartCount": restarts, "state": state}
    return found if last is None else {**found, "lastState": {"terminated": last}}


def waiting(reason: str, message: str = "", **more: Any) -> Obj:
    return container({"waiting": {"reason": reason, "message": message}}, **more)


def event(obj: Obj, reason: str, message: str, *, kind: str = "Warning", count: int = 1, age: float = 10.0) -> Obj:
    return {
        "metadata": {"name": f"{reason}-{age}"},
        "involvedObject": {"kind": obj["kind"], "name": obj["metadata"]["name"]},
        "reason": reason,
        "message": message,
        "type": kind,
        "count": count,
        "lastTimestamp": ago(age),
    }


def node(name: str, labels: dict[str, str] | None = None, taints: tuple[Obj, ...] = (), **allocatable: str) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": list(taints)},
        "status": {"allocatable": allocatable},
    }


def claim(name: str = "models", phase: str = "Pending", **spec: str) -> Obj:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": spec,
        "status": {"phase": phase},
    }


def job(name: str = "download", *conditions: Obj, began: float = 35.0) -> Obj:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "status": {"startTime": ago(began), "conditions": list(conditions)},
    }


READY = (condition("Ready", True, "NonZeroServeEndpoints"), condition("UpgradeInProgress", False, "NoPendingCluster"))
STARTING = (condition("Ready", False, "Initializing"),)


def snapshot(its_service: Obj | None = None, **parts: Any) -> Snapshot:
    """One that is coming up, of these parts."""
    return Snapshot(its_service or service(*STARTING), now=NOW, **parts)
