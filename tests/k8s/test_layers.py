"""The Kubernetes client and Helm's SDK stay in one package, and are asked for only by the commands that need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.serving.test_layers import LAYERS, imported_by, within


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "k8s"])
def test_only_k8s_imports_the_kubernetes_client_and_helm(layer: str) -> None:
    assert within(imported_by(layer), "kubernetes", "helm_python") == []


def test_k8s_imports_no_other_layer() -> None:
    ours = {name.split(".")[1] for _, name in within(imported_by("k8s"), "paceline") if name.count(".") > 1}
    assert ours <= {"k8s", "errors", "config"}


def test_the_command_line_starts_without_the_kubernetes_client() -> None:
    code = "import sys, paceline.cli.app; print(sorted({'kubernetes', 'helm_python'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
