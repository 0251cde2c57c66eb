"""The published chart has the operator's chart in it, from a repository of charts; a checkout does without both."""

from __future__ import annotations

import runpy
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from tests.k8s.charts import CHART, ROOT

PACKAGE = runpy.run_path(str(ROOT / "helm" / "package.py"))
OPERATOR: dict[str, str] = PACKAGE["OPERATOR"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[str]:
    """One that holds a chart of the operator's name and version, with one object."""
    folder = tmp_path / "repository"
    chart = folder / OPERATOR["name"]
    (chart / "templates").mkdir(parents=True)
    about = {"apiVersion": "v2", "name": OPERATOR["name"], "version": OPERATOR["version"]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    operator = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "operator"}}
    (chart / "templates" / "operator.yaml").write_text(yaml.safe_dump(operator))
    helm_python.package(chart, destination=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    url = f"http://127.0.0.1:{server.server_port}"
    helm_python.repo_index_generate(folder, base_url=url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def names(archive: Path, values: dict[str, Any]) -> list[str]:
    """Of the rendered objects."""
    with helm_python.Chart.load(archive) as chart:
        texts = chart.render(values, name="demo").items()
    found = (yaml.safe_load_all(text) for path, text in texts if path.endswith(".yaml"))
    return [each["metadata"]["name"] for objects in found for each in objects if each]


def test_the_operator_is_installed_if_it_is_wanted(repository: str, tmp_path: Path) -> None:
    archive = PACKAGE["package"](CHART, tmp_path / "dist", repository=repository)
    assert "operator" in names(archive, {"kuberay-operator": {"install": True}})
    assert "operator" not in names(archive, {})


def test_a_checkout_has_all_its_dependencies() -> None:
    assert {each["status"] for each in helm_python.dependency_list(CHART)} <= {"ok", "unpacked"}


def test_the_crds_that_are_checked_are_of_the_operator_that_is_packaged() -> None:
    assert OPERATOR["version"] in (Path(__file__).parent / "data" / "README.md").read_text()
