"""What an API server alone lacks: Kubernetes' garbage collection, and the parts of KubeRay that write a status."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from paceline.errors import ClusterError
from paceline.k8s.api import Api
from paceline.k8s.connect import connect
from paceline.k8s.kinds import EVENTS, NODES, PODS, RAY_CLUSTERS, RAY_SERVICES, Obj, Resource, name_of

DATA = Path(__file__).parents[1] / "data"
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
KINDS = ("v1/PersistentVolumeClaim", "batch/v1/Job", "apps/v1/StatefulSet", "ray.io/v1/RayService", "v1/ConfigMap")
KINDS += ("v1/ServiceAccount", "networking.k8s.io/v1/NetworkPolicy", "v1/Service", "v1/Secret", "v1/Pod")
LOOK_EVERY_S = 0.2


def load_crds(api: Api) -> None:
    """KubeRay's, unless they are there; returns when the server serves them."""
    for file in sorted(DATA.glob("*.yaml.gz")):
        crd = yaml.safe_load(gzip.decompress(file.read_bytes()))
        if api.find(CRDS, name_of(crd)) is None:
            api.create(CRDS, crd)
    waiting = threading.Event()
    for _ in range(300):
        if {"RayService", "RayCluster"} <= set(api.resources("ray.io/v1")):
            return
        api.forget("ray.io/v1")
        waiting.wait(0.1)
    raise AssertionError("the API server does not serve KubeRay's kinds")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: bool, reason: str, message: str = "") -> Obj:
    return {
        "type": kind,
        "status": "True" if status else "False",
        "reason": reason,
        "message": message,
        "lastTransitionTime": now(),
    }


class Operator:
    """Collects garbage in its thread from `with` on. What `come_up` names is made ready, as soon as it is seen."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.api = connect(kubeconfig, namespace=namespace)
        self._own = connect(kubeconfig, namespace=namespace)  # the thread's: connections are not shared
        self._end = threading.Event()
        self._bringing_up = threading.Event()
        self._thread = threading.Thread(target=self._play)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._collect()  # once more: what the test deleted last
        self._own.close()
        self.api.close()

    def come_up(self) -> None:
        """From now on, every RayService becomes ready."""
        self._bringing_up.set()

    def _play(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            self._collect()
            if self._bringing_up.is_set():
                for service in self._own.list_all(RAY_SERVICES):
                    if (service.get("status") or {}).get("observedGeneration") != service["metadata"]["generation"]:
                        ready(self._own, service)

    def _collect(self) -> None:
        for kind in KINDS:
            version, _, name = kind.rpartition("/")
            resource = self._own.resource(version, name)
            for obj in self._own.list_all(resource):
                if obj["metadata"].get("deletionTimestamp"):
                    try:
                        self._own.patch(resource, name_of(obj), {"metadata": {"finalizers": None}})
                    except ClusterError:
                        continue  # gone meanwhile

    # one thing at a time

    def service(self, release: str = "paceline") -> Obj:
        return self.api.get(RAY_SERVICES, release)

    def say(self, name: str, **status: Any) -> None:
        """Write the status of a RayService, as having seen it."""
        generation = self.service(name)["metadata"]["generation"]
        self.api.patch(RAY_SERVICES, name, {"status": {"observedGeneration": generation, **status}}, "status")

    def cluster(self, service: str, name: str) -> Obj:
        """A RayCluster of a RayService."""
        labels = {"ray.io/originated-from-cr-name": service, "ray.io/originated-from-crd": "RayService"}
        spec = self.service(service)["spec"]["rayClusterConfig"]
        obj = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
        }
        return self.api.create(RAY_CLUSTERS, obj)

    def pod(
        self,
        cluster: str,
        group: str,
        name: str,
        *,
        status: Mapping[str, Any] | None = None,
        resources: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> Obj:
        """A Ray pod; `group` head makes it the head's."""
        labels = {
            "ray.io/cluster": cluster,
            "ray.io/group": "headgroup" if group == "head" else group,
            "ray.io/node-type": "head" if group == "head" else "worker",
            "ray.io/is-ray-node": "yes",
        }
        container = {"name": "ray", "image": "example.com/paceline:1", "resources": {"limits": dict(resources or {})}}
        made = self.api.create(
            PODS,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels},
                "spec": {"containers": [container], **spec},
            },
        )
        if status is not None:
            self.api.patch(PODS, name, {"status": dict(status)}, "status")
        return made

    def event(self, obj: Obj, reason: str, message: str, kind: str = "Warning", count: int = 1) -> None:
        about = {
            "kind": obj["kind"],
            "name": name_of(obj),
            "namespace": self.api.namespace,
            "uid": obj["metadata"]["uid"],
        }
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": "e-"},
            "involvedObject": about,
            "reason": reason,
            "message": message,
            "type": kind,
            "count": count,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
        }
        self.api.create(EVENTS, event)

    def node(self, name: str, labels: Mapping[str, str], **allocatable: str) -> Obj:
        """A node; the caller deletes it, for it belongs to no namespace."""
        obj = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": dict(labels)}}
        made = self.api.create(NODES, obj)
        self.api.patch(NODES, name, {"status": {"allocatable": allocatable, "capacity": allocatable}}, "status")
        return made


READY_POD = {
    "phase": "Running",
    "conditions": [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": "True"},
    ],
    "containerStatuses": [
        {
            "name": "ray",
            "image": "i",
            "imageID": "i",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }
    ],
}
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
}


def waiting_container(reason: str, message: str, **more: Any) -> Obj:
    """The status of a pod whose container waits."""
    status = {
        "name": "ray",
        "image": "example.com/paceline:1",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": {"reason": reason, "message": message}},
        **more,
    }
    return {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}],
        "containerStatuses": [status],
    }


def ready(api: Api, service: Obj) -> None:
    """As KubeRay leaves a RayService that serves."""
    status = {
        "observedGeneration": service["metadata"]["generation"],
        "numServeEndpoints": 1,
        "conditions": [
            condition("Ready", True, "NonZeroServeEndpoints"),
            condition("UpgradeInProgress", False, "NoPendingCluster"),
        ],
        "activeServiceStatus": {"applicationStatuses": {"paceline": {"status": "RUNNING"}}},
    }
    api.patch(RAY_SERVICES, name_of(service), {"status": status}, "status")
