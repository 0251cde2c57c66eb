"""What an API server calls things, and where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

Obj = dict[str, Any]
"""An object of Kubernetes, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as one API server serves it."""

    group: str  # empty is the core's
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """As errors and `kubectl` write it: `rayservices.ray.io`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Of a collection, an object, or a part of one. A kind that has no namespaces ignores it; None is all."""
        parts = [api_root(self.api_version)]
        if self.namespaced and namespace is not None:
            parts.append(f"namespaces/{quote(namespace, safe='')}")
        parts.append(self.plural)
        parts += [quote(name, safe="")] if name else []
        parts += [subresource] if subresource else []
        return "/".join(parts)


def api_root(api_version: str) -> str:
    """`/api/v1` of the core, `/apis/…` of every other group."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def resource_of(entry: Mapping[str, Any], api_version: str) -> Resource:
    """Of an entry of the list that discovery gives."""
    group, _, version = api_version.rpartition("/")
    return Resource(group, version, entry["name"], entry["kind"], bool(entry["namespaced"]))


def guessed(api_version: str, kind: str) -> Resource:
    """A kind without asking a server: its plural by the rule that all those of Kubernetes keep to."""
    group, _, version = api_version.rpartition("/")
    word = kind.lower()
    if word.endswith("s"):
        plural = f"{word}es"
    else:
        plural = f"{word[:-1]}ies" if word.endswith("y") and word[-2] not in "aeiou" else f"{word}s"
    return Resource(group, version, plural, kind)


PODS = Resource("", "v1", "pods", "Pod")
EVENTS = Resource("", "v1", "events", "Event")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
SERVICES = Resource("", "v1", "services", "Service")
JOBS = Resource("batch", "v1", "jobs", "Job")
RAY_SERVICES = Resource("ray.io", "v1", "rayservices", "RayService")
RAY_CLUSTERS = Resource("ray.io", "v1", "rayclusters", "RayCluster")
ACCESS_REVIEWS = Resource(
    "authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", namespaced=False
)

INSTALL = {
    "ray.io": "install the KubeRay operator: helm install kuberay-operator kuberay-operator "
    "--repo https://ray-project.github.io/kuberay-helm/",
    "monitoring.coreos.com": "install the Prometheus operator, or turn serviceMonitor and prometheusRule off",
    "gateway.networking.k8s.io": "install the Gateway API's CRDs, or turn httpRoute and grpcRoute off",
}
"""What to do where a server does not know a group."""


def name_of(obj: Mapping[str, Any]) -> str:
    return str(obj["metadata"]["name"])


def labels_of(obj: Mapping[str, Any]) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def title(obj: Mapping[str, Any]) -> str:
    """`RayService paceline`."""
    return f"{obj['kind']} {name_of(obj)}"
