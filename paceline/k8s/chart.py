"""The chart as plain objects: Helm's own renderer, no cluster contacted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import ConfigError
from paceline.k8s.connect import MISSING
from paceline.k8s.kinds import Obj
from paceline.k8s.release import stamped

PACKAGED = Path(__file__).parent / "chart"
CHECKOUT = Path(__file__).resolve().parents[2] / "helm" / "paceline"
TEST_HOOK = "test"


def chart_folder() -> Path:
    """The chart in the installed package, or in the checkout this runs from. Raises ConfigError."""
    for folder in (PACKAGED, CHECKOUT):
        if (folder / "Chart.yaml").is_file():
            return folder
    raise ConfigError("this installation has no chart; install Paceline from a wheel, or run it from a checkout")


def presets(folder: Path | None = None) -> list[str]:
    """Names for --preset: `values-NAME.yaml` beside the chart's values."""
    files = (folder or chart_folder()).glob("values-*.yaml")
    return sorted(file.stem.removeprefix("values-") for file in files)


def gather_values(preset: str | None, files: Sequence[Path], sets: Sequence[str]) -> dict[str, Any]:
    """One tree of values: the preset, then each file, then each `key=value`; what comes later wins.

    Raises ConfigError naming the option.
    """
    helm = _helm()
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in (known := presets()):
            raise ConfigError(f"--preset: {preset}: there is {', '.join(known) or 'none'}", param="preset")
        values = _merged(values, _file(chart_folder() / f"values-{preset}.yaml"))
    for file in files:
        values = _merged(values, _file(file))
    for pair in sets:
        try:
            values = _merged(values, helm.parse_set_string(pair))
        except helm.HelmError as error:
            raise ConfigError(f"--set: {pair!r}: {_line(error)}; give key=value", param="set") from None
    return values


def render(values: Mapping[str, Any], *, name: str, namespace: str) -> list[Obj]:
    """Every object of a release, labelled as its own. Raises ConfigError naming the value that is wrong."""
    helm = _helm()
    try:
        with helm.Chart.load(chart_folder()) as chart:  # rendering changes a chart: one for each
            manifests = chart.render(dict(values), name=name, namespace=namespace)
    except helm.HelmError as error:
        raise ConfigError(f"values: {_line(error)}", param="values") from None
    texts = [text for template, text in sorted(manifests.items()) if not template.endswith("NOTES.txt")]
    objects = [obj for text in texts for obj in yaml.safe_load_all(text) if isinstance(obj, dict)]
    return [stamped(obj, name) for obj in objects if _hook(obj) != TEST_HOOK]


def as_yaml(objects: Sequence[Obj]) -> str:
    """Documents one after the other, keys in the order they were written."""
    return "".join(
        f"---\n{yaml.dump(obj, Dumper=_Blocks, sort_keys=False, width=120, allow_unicode=True)}" for obj in objects
    )


class _Blocks(yaml.SafeDumper):
    """Texts of several lines stay so, such as Serve's config in a RayService."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)


def _hook(obj: Obj) -> str:
    return str((obj["metadata"].get("annotations") or {}).get("helm.sh/hook", ""))


def _file(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--values: {path}: {error.strerror}", param="values") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--values: {path}: not YAML: {' '.join(str(error).split())}", param="values") from None
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"--values: {path}: a tree of values is wanted, such as `model: …`", param="values")
    return found or {}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Trees laid over each other as Helm does it: a null stays, and takes the chart's default away."""
    found = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _line(error: Exception) -> str:
    """Helm's words on one line, less the path of the template that noticed."""
    text = " ".join(str(error).split())
    called = re.search(r"(?:error calling fail|execution error at \([^)]*\)): (.+)$", text)
    return called[1] if called else text


def _helm() -> Any:
    try:
        import helm_python
    except ModuleNotFoundError:
        raise ConfigError(MISSING) from None
    return helm_python
