"""Who may import what: Ray stays in serving, gRPC in rpc, so that the rest is tested and used without them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline

PACKAGE = Path(paceline.__file__).parent
LAYERS = sorted({file.relative_to(PACKAGE).parts[0] for file in PACKAGE.rglob("*.py")})
"""Folders, and the files beside them."""


def imports(path: Path) -> Iterator[str]:
    """Every name a file imports, wherever in the file, with a dot at its end."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name}." for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}." for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (f"{each.value}." for each in node.args[:1] if isinstance(each, ast.Constant))


def imported_by(layer: str) -> list[tuple[str, str]]:
    """(file, module) for every import of a layer."""
    place = PACKAGE / layer
    files = [place] if place.suffix else sorted(place.rglob("*.py"))
    return [(file.name, name) for file in files for name in imports(file)]


def within(found: list[tuple[str, str]], *packages: str) -> list[tuple[str, str]]:
    return [(file, name) for file, name in found if name.startswith(tuple(f"{package}." for package in packages))]


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "serving"])
def test_only_serving_imports_ray(layer: str) -> None:
    assert within(imported_by(layer), "ray") == []


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer not in ("client", "rpc", "serving", "v1")])
def test_only_rpc_serving_and_the_client_import_grpc(layer: str) -> None:
    assert within(imported_by(layer), "grpc") == []


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer in ("engine", "models", "sessions", "speculation")]
)
def test_a_lower_layer_imports_nothing_of_those_above(layer: str) -> None:
    above = ("paceline.api", "paceline.cli", "paceline.rpc", "paceline.serving", "paceline.v1")
    assert within(imported_by(layer), *above) == []


def test_speculation_imports_nothing_of_the_engine() -> None:
    assert within(imported_by("speculation"), "paceline.engine") == []


def test_the_search_finds_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    if True:\n        from ray import serve\n        import grpc.aio\n")
    assert list(imports(file)) == ["ray.serve.", "grpc.aio."]


@pytest.mark.parametrize(
    "modules",
    [
        "paceline.engine.engine, paceline.engine.loop",
        "paceline.sessions.placement, paceline.sessions.prefixes, paceline.sessions.stores",
    ],
    ids=["engine", "sessions"],
)
def test_a_lower_layer_runs_without_ray_and_grpc(modules: str) -> None:
    code = f"import sys, {modules}; print(sorted({{'ray', 'grpc'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
