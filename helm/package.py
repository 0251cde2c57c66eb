"""The chart as it is published: with KubeRay's operator, which `kuberay-operator.install` switches on.

Helm refuses a chart that names a dependency it does not have, even one that is switched off. A checkout is installed
without the network, so its Chart.yaml does not name the operator; here it is added to a copy.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import helm_python
import yaml

OPERATOR = {
    "name": "kuberay-operator",
    "version": "1.7.0",
    "repository": "https://ray-project.github.io/kuberay-helm",
    "condition": "kuberay-operator.install",
}


def package(chart: Path, into: Path, *, repository: str = OPERATOR["repository"]) -> Path:
    """The archive. Fetches the operator's chart; raises helm_python.HelmError if that fails."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / chart.name
        shutil.copytree(chart, copy)
        about = yaml.safe_load((copy / "Chart.yaml").read_text())
        about.setdefault("dependencies", []).append(OPERATOR | {"repository": repository})
        (copy / "Chart.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
        helm_python.dependency_update(copy)
        return Path(helm_python.package(copy, destination=into))
