"""Pods as they will be, and which policies of a release concern them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.k8s import charts

Object = dict[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Pod:
    """What a selector sees of a pod, or of an address outside of the cluster: then `namespace` is None."""

    labels: Labels = field(default_factory=dict)
    namespace: str | None = "serving"
    namespace_labels: Labels = field(default_factory=dict)


def ray_pods(objects: Iterable[Object]) -> dict[str, Pod]:
    """Head and workers by group: labels of the template, and over them those that KubeRay 1.7 sets on every pod."""
    service = charts.find(objects, "RayService")
    groups = {"headgroup": charts.head(service), **charts.groups(service)}
    return {name: Pod(_labels(name, group)) for name, group in groups.items()}


def _labels(name: str, group: Object) -> Labels:
    kind = "head" if name == "headgroup" else "worker"
    cluster = "demo-paceline-x7k2p"  # with a part that KubeRay draws
    kept = {"ray.io/cluster": cluster, "ray.io/node-type": kind, "ray.io/group": name}
    overridable = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{cluster}-{kind}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return {**overridable, **group["template"]["metadata"]["labels"], **kept}


def template_pod(owner: Object) -> Pod:
    """Of a Job or StatefulSet."""
    return Pod(owner["spec"]["template"]["metadata"]["labels"])


def selects(selector: Object, labels: Labels) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _expression(each, labels) for each in selector.get("matchExpressions", [])
    )


def _expression(expression: Object, labels: Labels) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]


def may_connect(objects: Iterable[Object], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the network policies among the objects let `source` open a connection to `target`."""
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    return _allowed(policies, "Ingress", target, source, port, protocol) and _allowed(
        policies, "Egress", source, target, port, protocol
    )


def _allowed(policies: list[Object], direction: str, pod: Pod, peer: Pod, port: int, protocol: str) -> bool:
    """A pod that no policy of a direction concerns is open there; else one of their rules must let the peer through."""
    concerned = [
        each["spec"]
        for each in policies
        if pod.namespace == each["metadata"]["namespace"]
        and direction in each["spec"]["policyTypes"]
        and selects(each["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for spec in concerned for rule in spec.get(direction.lower(), [])]
    return not concerned or any(_through(rule, direction, pod, peer, port, protocol) for rule in rules)


def _through(rule: Object, direction: str, pod: Pod, peer: Pod, port: int, protocol: str) -> bool:
    peers, ports = rule.get("from" if direction == "Ingress" else "to"), rule.get("ports")
    there = peers is None or any(_is(each, pod, peer) for each in peers)
    return there and (ports is None or {"protocol": protocol, "port": port} in ports)


def _is(entry: Object, pod: Pod, peer: Pod) -> bool:
    if "ipBlock" in entry or peer.namespace is None:
        return "ipBlock" in entry and peer.namespace is None
    if "namespaceSelector" in entry:
        near = selects(entry["namespaceSelector"], peer.namespace_labels)
    else:
        near = peer.namespace == pod.namespace
    return near and selects(entry.get("podSelector", {}), peer.labels)
