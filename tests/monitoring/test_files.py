"""The dashboards and alerts, as far as they can be judged without a Grafana and a Prometheus."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.monitoring.files import (
    ALERT_TESTS,
    ALERTS,
    DASHBOARDS,
    FOLDER,
    dashboard,
    expressions,
    metrics,
    rules,
    wanted,
)

each_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard(path)["panels"]
    return found


def test_the_dashboards_are_those_of_their_source() -> None:
    built = subprocess.run(
        [sys.executable, str(FOLDER / "grafana" / "build.py"), "--check"], capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")


def test_every_dashboard_has_a_uid_of_its_own() -> None:
    assert len({dashboard(path)["uid"] for path in DASHBOARDS}) == len(DASHBOARDS) == 4


@each_dashboard
def test_every_panel_has_a_number_of_its_own(path: Path) -> None:
    assert [number for number, times in Counter(panel["id"] for panel in panels(path)).items() if times > 1] == []


@each_dashboard
def test_no_two_panels_of_a_dashboard_have_one_title(path: Path) -> None:
    titles = Counter(panel["title"] for panel in panels(path))
    assert [title for title, times in titles.items() if times > 1] == []


@each_dashboard
def test_panels_do_not_lie_on_each_other(path: Path) -> None:
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels(path))
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


@each_dashboard
def test_every_panel_says_what_it_shows(path: Path) -> None:
    assert [panel["title"] for panel in panels(path) if panel["type"] != "row" and not panel["description"]] == []


@each_dashboard
def test_every_expression_of_a_dashboard_parses(path: Path) -> None:
    for text in expressions(path):
        promql_parser.parse(text)


@each_dashboard
def test_a_dashboard_uses_no_variable_that_it_does_not_have(path: Path) -> None:
    assert [text for text in expressions(path) if "$" in text] == []


@each_dashboard
def test_panels_ask_the_datasource_that_was_chosen(path: Path) -> None:
    asked = {target["datasource"]["uid"] for panel in panels(path) for target in panel.get("targets", ())}
    assert asked == {"${datasource}"}


@each_dashboard
def test_counters_are_shown_as_rates(path: Path) -> None:
    """A counter as it stands tells how long a replica has been there."""
    for text in expressions(path):
        for name in metrics(text):
            if name.endswith(("_total", "_bucket", "_sum", "_count")):
                assert f"rate({name}" in text or f"increase({name}" in text, text


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule.get("alert") or rule["record"]))
def test_every_rule_parses(rule: dict[str, Any]) -> None:
    promql_parser.parse(rule["expr"])


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["labels"]["severity"] for rule in alerts} == {"critical", "warning", "info"}
    assert [rule["alert"] for rule in alerts if not rule["annotations"].keys() >= {"summary", "description"}] == []


def test_every_alert_fires_in_a_test_of_its_own() -> None:
    tests = yaml.safe_load(ALERT_TESTS.read_text())["tests"]
    fired = {sample["labels"] for test in tests for each in test["promql_expr_test"] for sample in each["exp_samples"]}
    assert fired == {f'{{alertname="{rule["alert"]}"}}' for rule in rules() if "alert" in rule}


def test_expressions_ask_for_many_metrics() -> None:
    """Else the test of them against a live server would hold of nothing."""
    assert len(wanted()) > 50


def promtool(*arguments: str) -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("the alerts are NOT TESTED: there is no promtool here (Debian: apt-get install prometheus)")
    done = subprocess.run([found, *arguments], cwd=ALERTS.parent, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert promtool("test", "rules", ALERT_TESTS.name) == ""


def test_prometheus_takes_its_configuration() -> None:
    assert promtool("check", "config", "prometheus.yaml") == ""


@pytest.mark.parametrize("path", FOLDER.rglob("*.yaml"), ids=lambda path: path.name)
def test_every_yaml_file_is_one(path: Path) -> None:
    assert yaml.safe_load(path.read_text())
