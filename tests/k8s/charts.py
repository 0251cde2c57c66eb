"""The chart as Helm renders it, without a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "paceline"
PRESETS = {path.stem.removeprefix("values-"): path for path in sorted(CHART.glob("values-*.yaml"))}

Object = dict[str, Any]
Values = Mapping[str, Any]


def render(values: Values | None = None, *, name: str = "demo", namespace: str = "serving") -> list[Object]:
    """Objects of a release. Raises helm_python's errors for values that the schema or a template refuses."""
    with helm_python.Chart.load(CHART) as chart:  # rendering changes a loaded chart, so each gets its own
        files = chart.render(dict(values or {}), name=name, namespace=namespace)
    manifests = (text for path, text in sorted(files.items()) if not path.endswith("NOTES.txt"))
    return [each for text in manifests for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def refusal(values: Values) -> str:
    """What Helm says of wrong values."""
    try:
        render(values)
    except helm_python.HelmError as error:
        return str(error)
    raise AssertionError(f"not refused: {values}")


def defaults() -> dict[str, Any]:
    """values.yaml."""
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


@cache
def preset(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(PRESETS[name].read_text())
    return values


def find(objects: Iterable[Object], kind: str) -> Object:
    """The only one of its kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def rayservice(values: Values | None = None, **options: str) -> Object:
    return find(render(values, **options), "RayService")


def serve_config(service: Object) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def args(service: Object) -> dict[str, Any]:
    """Paceline's settings in it."""
    (application,) = serve_config(service)["applications"]
    found: dict[str, Any] = application["args"]
    return found


def groups(service: Object) -> dict[str, Object]:
    """Worker groups by name."""
    return {each["groupName"]: each for each in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def head(service: Object) -> Object:
    found: Object = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return found


def pod(group: Object) -> Object:
    """Pod spec of a group or of the head."""
    found: Object = group["template"]["spec"]
    return found


def container(group: Object) -> Object:
    """Its Ray container."""
    found: Object = pod(group)["containers"][0]
    return found


def environment(group: Object) -> dict[str, Any]:
    """Variables with a plain value."""
    return {each["name"]: each["value"] for each in container(group)["env"] if "value" in each}
