"""A real API server, from the environment; each test in a namespace of its own, playing the operator."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest

from paceline.k8s.api import Api
from paceline.k8s.connect import connect
from paceline.k8s.kinds import NAMESPACES
from paceline.ports import is_loopback
from tests.cli.conftest import Outcome, Run, run  # noqa: F401
from tests.k8s.commands.operator import Operator, load_crds

ALLOW = "PACELINE_TEST_CLUSTER"


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """Of a server these tests may use. Skips, loudly, without one."""
    given = os.environ.get("KUBECONFIG")
    if not given or not Path(given).is_file():
        pytest.skip("NOT RUN: no Kubernetes API server: set KUBECONFIG to a kubeconfig of one made for tests")
    with connect(Path(given)) as api:
        if not is_loopback(urlparse(api.address).hostname or "") and not os.environ.get(ALLOW):
            pytest.skip(f"NOT RUN: {api.address} is no server of this machine; {ALLOW}=1 allows it all the same")
        load_crds(api)
    return Path(given)


@pytest.fixture
def namespace(kubeconfig: Path) -> Iterator[str]:
    """A new one, of which nothing is left that finalizers could hold."""
    name = f"paceline-test-{uuid.uuid4().hex[:10]}"
    with connect(kubeconfig, namespace=name) as api:
        api.apply(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        yield name
        with Operator(kubeconfig, name):
            api.delete(NAMESPACES, name, propagation="Background")


@pytest.fixture
def api(kubeconfig: Path, namespace: str) -> Iterator[Api]:
    with connect(kubeconfig, namespace=namespace) as made:
        yield made


@pytest.fixture
def operator(kubeconfig: Path, namespace: str) -> Iterator[Operator]:
    """Garbage is collected as on a real cluster; RayServices come up when the test says so."""
    with Operator(kubeconfig, namespace) as playing:
        yield playing


@dataclass(frozen=True)
class Command:
    """`paceline k8s …` in the test's namespace."""

    run: Callable[..., Outcome]
    kubeconfig: Path
    namespace: str

    def __call__(self, name: str, *arguments: str) -> Outcome:
        where = ("--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace)
        return self.run("k8s", name, *arguments, *where)


@pytest.fixture
def k8s(run: Run, kubeconfig: Path, namespace: str) -> Command:  # noqa: F811
    return Command(run, kubeconfig, namespace)
