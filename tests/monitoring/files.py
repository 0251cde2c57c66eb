"""The files under monitoring/, and what their expressions ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "monitoring"
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
ALERTS = FOLDER / "prometheus" / "alerts.yaml"
ALERT_TESTS = FOLDER / "prometheus" / "alerts_test.yaml"
_NAME = re.compile(r"(?<![\w:])(?:vllm:|paceline[_:])\w+")
_STRING = re.compile(r'"[^"]*"')


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def expressions(path: Path) -> Iterator[str]:
    """Of a dashboard, with Grafana's variables replaced as Grafana does."""
    read = dashboard(path)
    panels = [target["expr"] for panel in read["panels"] for target in panel.get("targets", ())]
    marks = [mark["expr"] for mark in read["annotations"]["list"]]
    for text in (*panels, *marks):
        yield text.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$replica", ".*")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    """Names that Prometheus makes itself."""
    return {rule["record"] for rule in rules() if "record" in rule}


def metrics(expression: str) -> set[str]:
    """Names of series that a server has to export."""
    return set(_NAME.findall(_STRING.sub('""', expression))) - recorded()


def wanted() -> set[str]:
    """Of all dashboards and alerts."""
    asked = [text for path in DASHBOARDS for text in expressions(path)] + [rule["expr"] for rule in rules()]
    return set().union(*(metrics(text) for text in asked))
