"""What a Grafana dashboard is made of: queries, panels, rows, and the JSON they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA_VERSION = 39
"""Grafana 10.4 and later read it as it is; newer ones bring it up to date themselves."""
REPLICA = 'model_name=~"$model",replica=~"$replica"'
"""Of what a target or a draft replica reports."""
MODEL = 'model_name=~"$model"'
"""Of what is told once for a server."""


def rate(metric: str, labels: str = REPLICA) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def router_rate(metric: str, by: str = "", matching: str = "") -> str:
    """Of what routers count. A scrape comes to one of them: over a time in which each was asked."""
    return f"{summed(by)} (rate({metric}{{{MODEL}{matching}}}[5m]))"


def total_rate(metric: str, by: str = "", labels: str = REPLICA) -> str:
    return f"{summed(by)} ({rate(metric, labels)})"


def gauge(metric: str, by: str = "", labels: str = REPLICA) -> str:
    return f"{summed(by)} ({metric}{{{labels}}})"


def quantile(q: float, histogram: str, by: str = "") -> str:
    names = ", ".join(name for name in ("le", by) if name)
    return f"histogram_quantile({q}, sum by ({names}) ({rate(f'{histogram}_bucket')}))"


def mean(histogram: str, by: str = "") -> str:
    return f"{total_rate(f'{histogram}_sum', by)} / {total_rate(f'{histogram}_count', by)}"


def summed(by: str) -> str:
    return f"sum by ({by})" if by else "sum"


@dataclass(frozen=True)
class Query:
    """One expression. A `heatmap` one has a series for each bucket."""

    expr: str
    legend: str = ""
    heatmap: bool = False

    def json(self, place: int, *, instant: bool) -> dict[str, Any]:
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": self.expr,
            "legendFormat": self.legend or "__auto",
            "format": "heatmap" if self.heatmap else "time_series",
            "instant": instant,
            "range": not instant,
            "refId": chr(ord("A") + place),
        }


@dataclass(frozen=True)
class Panel:
    """A title, what it tells, and its queries. `limits` are (value, color) pairs from which a value has a color."""

    title: str
    text: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stack: bool = False
    limits: Sequence[tuple[float, str]] = ()
    most: float | None = None
    """Where the axis or the gauge ends."""

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        instant = self.kind in ("stat", "bargauge")
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [query.json(place, instant=instant) for place, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": OPTIONS[self.kind],
        }

    def _defaults(self) -> dict[str, Any]:
        steps = [{"color": "green", "value": None}, *({"color": color, "value": at} for at, color in self.limits)]
        found: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}, "min": 0}
        if self.unit == SIGNED:
            found |= {"unit": "short", "min": None}
        if self.most is not None:
            found["max"] = self.most
        found["color"] = {"mode": "palette-classic" if self.kind == "timeseries" else "thresholds"}
        if self.kind == "timeseries":
            found["custom"] = {
                "drawStyle": "line",
                "lineWidth": 1,
                "fillOpacity": 30 if self.stack else 8,
                "showPoints": "never",
                "spanNulls": False,
                "stacking": {"mode": "normal" if self.stack else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.limits else "off"},
            }
        return found


SIGNED = "signed"
"""A plain number that may be below 0."""

_TABLE = {"calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _TABLE, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    },
    "bargauge": {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "valueMode": "color",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"unit": "s"},
    },
}


@dataclass(frozen=True)
class Row:
    """A heading with its panels below, from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """`uid` is also its place in a URL, and the name of its file."""

    uid: str
    title: str
    text: str
    rows: Sequence[Row]
    variables: Sequence[dict[str, Any]] = field(default_factory=lambda: VARIABLES)

    def json(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["paceline"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "timezone": "browser",
            "annotations": {"list": [DECISIONS]},
            "links": [LINKS],
            "templating": {"list": list(self.variables)},
            "panels": self._panels(),
        }

    def _panels(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            found.append(_heading(len(found) + 1, row.title, y))
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, height = 0, y + height, 0
                found.append(panel.json(len(found) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return found


def _heading(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _of_labels(name: str, label: str, query: str) -> dict[str, Any]:
    text = f"label_values({query}, {label})"
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": text,
        "query": {"query": text, "refId": name},
        "refresh": 2,  # with the time range: replicas come and go
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "sort": 1,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


VARIABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "datasource",
        "label": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "current": {},
    },
    _of_labels("model", "model_name", "vllm:num_requests_running"),
    _of_labels(
        "replica", "replica", '{__name__=~"vllm:num_requests_running|paceline_drafter_sequences",model_name=~"$model"}'
    ),
)

DECISIONS: dict[str, Any] = {
    "name": "Autoscaling decisions",
    "datasource": DATASOURCE,
    "enable": True,
    "iconColor": "purple",
    "expr": "sum by (pool, direction, reason) "
    f"(increase(paceline_autoscaling_decisions_total{{{MODEL}}}[$__rate_interval])) > 0",
    "titleFormat": "{{pool}} {{direction}}",
    "textFormat": "{{reason}}",
    "step": "15s",
}
LINKS: dict[str, Any] = {
    "title": "Paceline",
    "type": "dashboards",
    "tags": ["paceline"],
    "icon": "external link",
    "tooltip": "",
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
}
