"""The chart's Serve config is deployed by Serve, on a node that offers what the chart's groups offer, and answers.

A second application on the session's cluster. Its node is started by the command that KubeRay's pods run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from paceline.serving.cluster import Endpoints
from tests.k8s import charts
from tests.serve.conftest import Server
from tests.serve.test_tensor_parallel import apply

pytestmark = [pytest.mark.serve, pytest.mark.slow]

NAME = "chart"
PATIENCE_S = 90.0
# What a machine of two cores that runs another application besides has left.
SMALL = {"engine": {"threads": 1, "kv_tokens": 4096}}
VALUES = {
    **charts.preset("cpu"),
    "target": {"replicas": 1, "numCpus": 0.1, "drainTimeoutSeconds": 1},
    "draft": {"replicas": 1, "numCpus": 0.1},
    "config": {"target": SMALL, "draft": SMALL},
}


def wait_until(fact: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.25)


@contextlib.contextmanager
def node(resources: dict[str, float]) -> Iterator[None]:
    """A node of the session's Ray."""
    head = ray.nodes()[0]["NodeManagerAddress"]
    command: list[str | Path] = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus=1"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", f"--node-ip-address={head}"]
    command += [f"--resources={json.dumps(resources)}", "--object-store-memory=80000000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: resources.keys() <= ray.cluster_resources().keys())
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def deployed(cluster: Server) -> Iterator[Server]:
    from ray import serve

    service = charts.rayservice(VALUES)
    slots = {
        name: float(count) for group in charts.groups(service).values() for name, count in group["resources"].items()
    }
    (application,) = charts.serve_config(service)["applications"]
    config = copy.deepcopy(cluster.cluster._config)
    config["applications"].append({**application, "name": NAME, "route_prefix": f"/{NAME}"})

    def settled() -> bool:
        found = serve.status().applications.get(NAME)
        assert found is None or found.status != "DEPLOY_FAILED", found
        return found is not None and found.status == "RUNNING"

    with node({name: count for name, count in slots.items() if name != "CPU"}):
        try:
            apply(config)
            wait_until(settled)
            yield Server(Endpoints(f"{cluster.endpoints.http}/{NAME}", cluster.endpoints.grpc), cluster.cluster)
        finally:
            apply(cluster.cluster._config)
            wait_until(lambda: NAME not in serve.status().applications)


def test_answers_a_chat(deployed: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    answer = deployed.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_the_replicas_are_where_the_chart_puts_them(deployed: Server) -> None:
    status = deployed.status()
    head = ray.get_runtime_context().get_node_id()
    nodes = [each["node_id"] for each in (*status["targets"], *status["drafts"])]
    assert len(nodes) == 2
    assert head not in nodes
