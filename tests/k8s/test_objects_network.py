"""Who reaches what, by the rendered network policies and the labels that pods will have."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.k8s.charts import find, refusal, render
from tests.k8s.pods import Pod, may_connect, ray_pods, template_pod

HTTP, GRPC, DASHBOARD, RAY_METRICS, GCS, WORKER, AGENT = 8000, 9000, 8265, 8080, 6379, 10002, 52365
STRANGER = Pod({"app": "web"})
ELSEWHERE = Pod({"app": "web"}, "web", {"kubernetes.io/metadata.name": "web"})
INTERNET = Pod(namespace=None)
OPERATOR = Pod({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay", {"kubernetes.io/metadata.name": "kuberay"})
PROMETHEUS = Pod({"app": "prometheus"}, "monitoring", {"kubernetes.io/metadata.name": "monitoring"})
DNS = Pod({"k8s-app": "kube-dns"}, "kube-system", {"kubernetes.io/metadata.name": "kube-system"})
MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
REDIS = {"enabled": True, "install": True, "existingSecret": "redis-password"}
CACHE = {"enabled": True}


@cache
def _objects(**values: bool) -> list[dict[str, Any]]:
    policy: dict[str, Any] = {"egress": {"restrict": values.get("restrict", False)}}
    if values.get("closed"):
        policy |= {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}], "prometheus": [MONITORING]}
    return render({"networkPolicy": policy, "redis": REDIS, "modelCache": CACHE})


@pytest.mark.parametrize("port", [HTTP, GCS, DASHBOARD, WORKER, AGENT])
@pytest.mark.parametrize("restrict", [False, True])
def test_the_release_s_pods_reach_each_other_at_every_port(port: int, restrict: bool) -> None:
    objects = _objects(restrict=restrict)
    pods = ray_pods(objects).values()
    assert all(may_connect(objects, a, b, port) for a in pods for b in pods)


@pytest.mark.parametrize("port", [GCS, DASHBOARD, WORKER, AGENT, RAY_METRICS])
@pytest.mark.parametrize("who", [STRANGER, ELSEWHERE, INTERNET], ids=["same namespace", "another", "outside"])
def test_strangers_do_not_reach_ray(who: Pod, port: int) -> None:
    objects = _objects()
    assert not any(may_connect(objects, who, pod, port) for pod in ray_pods(objects).values())


@pytest.mark.parametrize("port", [HTTP, GRPC])
@pytest.mark.parametrize("who", [STRANGER, ELSEWHERE, INTERNET], ids=["same namespace", "another", "outside"])
def test_without_clients_everybody_reaches_http_and_grpc(who: Pod, port: int) -> None:
    objects = _objects()
    assert all(may_connect(objects, who, pod, port) for pod in ray_pods(objects).values())


@pytest.mark.parametrize("port", [HTTP, GRPC])
@pytest.mark.parametrize(("who", "may"), [(STRANGER, True), (ELSEWHERE, False), (INTERNET, False)])
def test_clients_are_the_only_ones(who: Pod, may: bool, port: int) -> None:
    objects = _objects(closed=True)
    assert {may_connect(objects, who, pod, port) for pod in ray_pods(objects).values()} == {may}


@pytest.mark.parametrize("port", [HTTP, DASHBOARD])
def test_the_operator_deploys_and_looks_whatever_the_clients_are(port: int) -> None:
    objects = _objects(closed=True)
    assert may_connect(objects, OPERATOR, ray_pods(objects)["headgroup"], port)


def test_a_pod_of_another_name_is_no_operator() -> None:
    objects = _objects()
    assert not may_connect(objects, ELSEWHERE, ray_pods(objects)["headgroup"], DASHBOARD)


@pytest.mark.parametrize(("port", "may"), [(HTTP, True), (RAY_METRICS, True), (GRPC, False), (DASHBOARD, False)])
def test_prometheus_reads_metrics_and_nothing_else(port: int, may: bool) -> None:
    objects = _objects(closed=True)
    assert may_connect(objects, PROMETHEUS, ray_pods(objects)["headgroup"], port) is may


def test_the_dashboard_opens_for_whom_it_is_told() -> None:
    objects = render({"networkPolicy": {"dashboard": [MONITORING]}})
    head = ray_pods(objects)["headgroup"]
    assert may_connect(objects, PROMETHEUS, head, DASHBOARD) and not may_connect(objects, ELSEWHERE, head, DASHBOARD)


@pytest.mark.parametrize(("who", "may"), [("target", True), ("headgroup", True)])
def test_ray_reaches_redis(who: str, may: bool) -> None:
    objects = _objects(restrict=True)
    assert may_connect(objects, ray_pods(objects)[who], template_pod(find(objects, "StatefulSet")), 6379) is may


@pytest.mark.parametrize("who", [STRANGER, ELSEWHERE, INTERNET, OPERATOR, PROMETHEUS])
def test_nobody_else_reaches_redis(who: Pod) -> None:
    objects = _objects()
    assert not may_connect(objects, who, template_pod(find(objects, "StatefulSet")), 6379)


def test_redis_reaches_nobody() -> None:
    objects = _objects()
    redis = template_pod(find(objects, "StatefulSet"))
    assert not any(may_connect(objects, redis, who, HTTP) for who in (STRANGER, INTERNET))


def test_kuberay_s_cleanup_of_redis_still_reaches_it() -> None:
    """Its job has the head's labels, but for the node's type."""
    objects = _objects(restrict=True)
    cleanup = Pod({**ray_pods(objects)["headgroup"].labels, "ray.io/node-type": "redis-cleanup"})
    assert may_connect(objects, cleanup, template_pod(find(objects, "StatefulSet")), 6379)


def test_nobody_reaches_the_download() -> None:
    objects = _objects()
    assert not any(may_connect(objects, who, template_pod(find(objects, "Job")), HTTP) for who in (STRANGER, INTERNET))


def test_egress_is_free_unless_it_is_restricted() -> None:
    objects = _objects()
    assert all(may_connect(objects, pod, INTERNET, 4317) for pod in ray_pods(objects).values())


@pytest.mark.parametrize(
    ("to", "port", "protocol", "may"),
    [
        (DNS, 53, "UDP", True),
        (DNS, 53, "TCP", True),
        (INTERNET, 443, "TCP", True),
        (INTERNET, 6443, "TCP", True),
        (INTERNET, 80, "TCP", False),
        (STRANGER, HTTP, "TCP", False),
    ],
)
def test_restricted_egress_leaves_names_and_https(to: Pod, port: int, protocol: str, may: bool) -> None:
    objects = _objects(restrict=True)
    everyone = [*ray_pods(objects).values(), template_pod(find(objects, "Job"))]
    assert {may_connect(objects, pod, to, port, protocol) for pod in everyone} == {may}


def test_egress_without_https_keeps_the_internet_away() -> None:
    objects = render({"networkPolicy": {"egress": {"restrict": True, "https": False}}})
    assert not any(may_connect(objects, pod, INTERNET, 443) for pod in ray_pods(objects).values())


def test_extra_egress_opens_what_it_says() -> None:
    rule = {"ports": [{"protocol": "TCP", "port": 4317}], "to": [MONITORING]}
    objects = render({"networkPolicy": {"egress": {"restrict": True, "extra": [rule]}}})
    target = ray_pods(objects)["target"]
    assert may_connect(objects, target, PROMETHEUS, 4317) and not may_connect(objects, target, PROMETHEUS, 4318)


def test_a_second_release_in_the_namespace_is_a_stranger() -> None:
    objects = _objects()
    (other, *_) = ray_pods(render(name="other")).values()
    assert not may_connect(objects, other, ray_pods(objects)["target"], WORKER)


def test_no_policies_where_they_are_off() -> None:
    objects = render({"networkPolicy": {"enabled": False}, "redis": REDIS, "modelCache": CACHE})
    assert not [each for each in objects if each["kind"] == "NetworkPolicy"]


def test_a_peer_that_is_no_mapping_is_refused_by_name() -> None:
    assert "networkPolicy/clients/0" in refusal({"networkPolicy": {"clients": ["10.0.0.0/8"]}}).replace(".", "/")
