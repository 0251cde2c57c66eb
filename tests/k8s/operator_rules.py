"""What KubeRay's operator asks of a RayService beyond its CRD's schema. It says so in an event; nothing is started.

Read from the operator's source, version 1.7 (validation.go, and service.go for the head's labels).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

MAX_NAME = 47
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(h|m|s|ms))+|[0-9]+")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
AMOUNTS = ("num-cpus", "num-gpus", "memory", "resources")
KEPT_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/created-by")
HEAD_ONLY_ENV = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")


def violations(service: Object) -> list[str]:
    """Rules that a RayService breaks; empty if none."""
    cluster = service["spec"]["rayClusterConfig"]
    return [
        *_metadata(service["metadata"]),
        *_upgrade(service["spec"], cluster),
        *_groups(cluster),
        *_autoscaler(cluster),
        *_redis(cluster),
        *_token(cluster),
        *_services(cluster),
    ]


def _metadata(metadata: Object) -> Iterator[str]:
    name, timeout = metadata["name"], metadata.get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if len(name) > MAX_NAME or not DNS_1035.fullmatch(name):
        yield f"name {name}: a DNS label of at most {MAX_NAME} characters that begins with a letter"
    if not DURATION.fullmatch(timeout) or not re.search("[1-9]", timeout):
        yield f"initializing-timeout {timeout}: a positive duration"


def _upgrade(spec: Object, cluster: Object) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds: not negative"
    if "upgradeStrategy" in cluster:
        yield "rayClusterConfig.upgradeStrategy: of a RayCluster of its own alone"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions", {})
    step, surge = options.get("stepSizePercent", -1), options.get("maxSurgePercent", 100)
    if not cluster.get("enableInTreeAutoscaling"):
        yield "incremental upgrade: needs the autoscaler"
    if not 0 <= step <= surge <= 100:
        yield "incremental upgrade: 0 <= stepSizePercent <= maxSurgePercent <= 100"
    if options.get("intervalSeconds", 0) <= 0:
        yield "incremental upgrade: intervalSeconds > 0"
    if not options.get("gatewayClassName"):
        yield "incremental upgrade: needs gatewayClassName"


def _all_groups(cluster: Object) -> Iterator[tuple[str, Object]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def _groups(cluster: Object) -> Iterator[str]:
    for name, group in _all_groups(cluster):
        if not group["template"]["spec"]["containers"]:
            yield f"{name}: needs a container"
        params = group["rayStartParams"]
        if group.get("resources") and any(params.get(key) for key in AMOUNTS):
            yield f"{name}: resources in both rayStartParams and resources"
        if "labels" in params:
            yield f"{name}: labels in rayStartParams"
        if not all(LABEL_VALUE.fullmatch(value) for value in group.get("labels", {}).values()):
            yield f"{name}: a label that is none"
    scales = cluster.get("enableInTreeAutoscaling")
    for group in cluster["workerGroupSpecs"]:
        name, fewest, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not scales and None in (fewest, most):
            yield f"{name}: minReplicas and maxReplicas without autoscaling"
        if None not in (fewest, most) and not 0 <= fewest <= most:
            yield f"{name}: 0 <= minReplicas <= maxReplicas"
        if group.get("suspend"):
            yield f"{name}: only a RayJob suspends groups"


def _autoscaler(cluster: Object) -> Iterator[str]:
    options, env = cluster.get("autoscalerOptions", {}), _environment(cluster["headGroupSpec"])
    second = bool(cluster.get("enableInTreeAutoscaling")) and options.get("version") == "v2"
    if "RAY_enable_autoscaler_v2" in env:
        yield "RAY_enable_autoscaler_v2: autoscalerOptions.version says it"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds: not negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in {each["name"] for each in options.get("env", [])}:
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD: KubeRay's own"
    for name, group in _all_groups(cluster):
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy Never under autoscaler v2"
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield f"{name}: idleTimeoutSeconds not negative"
        if not second and ("idleTimeoutSeconds" in group or group.get("priority")):
            yield f"{name}: idleTimeoutSeconds and priority under autoscaler v2 alone"


def _redis(cluster: Object) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    for name in HEAD_ONLY_ENV:
        if name in _environment(head):
            yield f"{name}: gcsFaultToleranceOptions says it"
    for name in ("redis-password", "redis-username"):
        if head["rayStartParams"].get(name):
            yield f"{name}: gcsFaultToleranceOptions says it"


def _token(cluster: Object) -> Iterator[str]:
    options = cluster.get("authOptions")
    if options is None:
        return
    if options.get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth: not for a RayService"
    version = cluster.get("rayVersion", "0")
    if options.get("mode", "token") == "token" and tuple(map(int, version.split("."))) < (2, 52, 0):
        yield f"token authentication: Ray 2.52 or later, not {version}"


def _services(cluster: Object) -> Iterator[str]:
    """KubeRay's services find pods by labels and ports; nothing says that they find none."""
    head = cluster["headGroupSpec"]
    for name, group in _all_groups(cluster):
        for label in KEPT_LABELS:
            if label in group["template"]["metadata"].get("labels", {}):
                yield f"{name}: {label} is how the head's service finds its pod"
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name: KubeRay's own"
    if "serve" not in {port.get("name") for port in head["template"]["spec"]["containers"][0].get("ports", [])}:
        yield "head: a port named serve"


def _environment(group: Object) -> set[str]:
    return {each["name"] for each in group["template"]["spec"]["containers"][0].get("env", [])}
