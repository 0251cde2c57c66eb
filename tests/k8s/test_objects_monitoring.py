"""What Prometheus' operator and Grafana's sidecar get."""

from __future__ import annotations

import json
from typing import Any

import promql_parser
import pytest
import yaml

from tests.k8s.charts import CHART, find, head, refusal, render
from tests.monitoring.files import ALERTS, DASHBOARDS

MAX_CONFIG_MAP = 1 << 20


def _monitor(**values: Any) -> dict[str, Any]:
    return find(render({"serviceMonitor": {"enabled": True, **values}}), "ServiceMonitor")


def _rule(**values: Any) -> dict[str, Any]:
    return find(render({"prometheusRule": {"enabled": True, **values}}), "PrometheusRule")


def _dashboards(**values: Any) -> list[dict[str, Any]]:
    return [each for each in render({"dashboards": {"enabled": True, **values}}) if each["kind"] == "ConfigMap"]


def test_nothing_of_it_is_made_by_default() -> None:
    assert not {"ServiceMonitor", "PrometheusRule", "ConfigMap"} & {each["kind"] for each in render()}


def test_one_address_is_scraped() -> None:
    """/metrics speaks of all replicas. KubeRay's service of the head has these labels and one pod behind it."""
    assert _monitor()["spec"]["selector"] == {
        "matchLabels": {
            "ray.io/originated-from-crd": "RayService",
            "ray.io/originated-from-cr-name": "demo-paceline",
            "ray.io/node-type": "head",
        }
    }


def test_the_port_is_one_that_the_head_names() -> None:
    """KubeRay's services have the ports of the head's container."""
    objects = render({"serviceMonitor": {"enabled": True}})
    ports = head(find(objects, "RayService"))["template"]["spec"]["containers"][0]["ports"]
    (endpoint,) = find(objects, "ServiceMonitor")["spec"]["endpoints"]
    assert {"name": endpoint["port"], "containerPort": 8000} in ports and endpoint["path"] == "/metrics"


def test_the_job_is_the_one_in_the_alerts() -> None:
    (endpoint,) = _monitor()["spec"]["endpoints"]
    assert {"targetLabel": "job", "replacement": "paceline"} in endpoint["relabelings"]
    assert 'up{job="paceline"}' in ALERTS.read_text()


def test_an_instance_is_a_release() -> None:
    (endpoint,) = _monitor()["spec"]["endpoints"]
    assert {"targetLabel": "instance", "replacement": "serving/demo-paceline"} in endpoint["relabelings"]


def test_the_key_for_metrics_comes_from_a_secret() -> None:
    (endpoint,) = _monitor(existingSecret="scrape", secretKey="k")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": {"name": "scrape", "key": "k"}}


def test_a_scrape_that_would_be_refused_is_refused_at_once() -> None:
    values = {"serviceMonitor": {"enabled": True}, "apiKeys": {"existingSecret": "keys"}}
    assert "serviceMonitor.existingSecret: " in refusal(values)


def test_open_metrics_need_no_key() -> None:
    keys = {"existingSecret": "keys", "metrics": "open"}
    (endpoint,) = find(render({"serviceMonitor": {"enabled": True}, "apiKeys": keys}), "ServiceMonitor")["spec"][
        "endpoints"
    ]
    assert "authorization" not in endpoint


@pytest.mark.parametrize("made", [_monitor, _rule])
def test_prometheus_finds_it_by_its_labels(made: Any) -> None:
    assert made(labels={"release": "prometheus"})["metadata"]["labels"]["release"] == "prometheus"


def test_the_alerts_are_those_of_monitoring() -> None:
    objectives, *alerts = yaml.safe_load(ALERTS.read_text())["groups"]
    ours, *theirs = _rule()["spec"]["groups"]
    assert theirs == alerts
    assert [each["record"] for each in ours["rules"]] == [each["record"] for each in objectives["rules"]]


def test_objectives_are_yours() -> None:
    objectives, *_ = _rule(ttftSeconds=1.5, itlSeconds=0.05)["spec"]["groups"]
    assert [each["expr"] for each in objectives["rules"]] == ["vector(1.5)", "vector(0.05)"]


def test_default_objectives_are_those_of_monitoring() -> None:
    assert _rule()["spec"]["groups"][0] == yaml.safe_load(ALERTS.read_text())["groups"][0]


def test_every_expression_of_the_rules_is_promql() -> None:
    for group in _rule()["spec"]["groups"]:
        for rule in group["rules"]:
            assert promql_parser.parse(rule["expr"]) is not None


def test_the_dashboards_are_those_of_monitoring() -> None:
    """Also what Grafana writes in braces, which Helm would take for its own."""
    made = {name: json.loads(text) for each in _dashboards() for name, text in each["data"].items()}
    assert made == {path.name: json.loads(path.read_text()) for path in DASHBOARDS} and made


def test_each_dashboard_fits_a_config_map() -> None:
    assert all(len(text) < MAX_CONFIG_MAP for each in _dashboards() for text in each["data"].values())


def test_the_sidecar_finds_them() -> None:
    made = _dashboards(annotations={"grafana_folder": "LLM"})
    assert {each["metadata"]["labels"]["grafana_dashboard"] for each in made} == {"1"}
    assert {each["metadata"]["annotations"]["grafana_folder"] for each in made} == {"LLM"}


def test_the_chart_s_copies_are_up_to_date() -> None:
    copies = {path.name: path.read_text() for path in (CHART / "files").rglob("*") if path.is_file()}
    assert copies == {path.name: path.read_text() for path in (ALERTS, *DASHBOARDS)}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("serviceMonitor", "interval", "often"),
        ("prometheusRule", "ttftSeconds", 0),
        ("dashboards", "labels", ["grafana"]),
        ("telemetry", "traceSampleRatio", 2),
        ("telemetry", "logFormat", "xml"),
        ("telemetry", "otlpEndpoint", "collector:4317"),
    ],
)
def test_a_wrong_value_is_refused_by_name(section: str, field: str, value: object) -> None:
    assert f"{section}/{field}" in refusal({section: {field: value}}).replace(".", "/")
