"""Traces and logs of a real cluster: its processes send their spans to a collector in this one, and write JSON.

A second application on the session's cluster, with one target and one draft.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Server
from tests.serve.test_tensor_parallel import NAME, apply, wait_for_status, with_application
from tests.telemetry.collector import Collector, Received
from tests.telemetry.recorded import CLIENT, CLIENT_SPAN, CLIENT_TRACE

pytestmark = [pytest.mark.serve, pytest.mark.slow]  # a second application: a minute to start

ONE = {"num_replicas": 1, "num_cpus": 0.1, "engine": {"threads": 1, "kv_tokens": 8192}}
PATIENCE_S = 60.0
CHAT = {"messages": [{"role": "user", "content": "List three uses of copper."}], "max_tokens": 24, "ignore_eos": True}
HEADERS = {"traceparent": CLIENT, "x-request-id": "mine-9", "x-session-id": "traced"}
SERVER, TARGET, DRAFT = "chat smollm2-135m", "paceline.generate", "paceline.draft"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(scope="module")
def answered(cluster: Server, collector: Collector) -> Iterator[dict[str, Any]]:
    """The answer to one chat of a client that traces."""
    telemetry = {"otlp_endpoint": collector.grpc, "log_format": "json", "log_requests": True}
    apply(with_application(cluster.cluster, target=ONE, draft=ONE, telemetry=telemetry))
    try:
        wait_for_status("RUNNING")
        url = f"{cluster.endpoints.http}/{NAME}"
        until(lambda: [each["drafters_connected"] for each in httpx.get(f"{url}/status").json()["targets"]] == [1])
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=HEADERS, timeout=120)
        yield answer.raise_for_status().json()
    finally:
        apply(cluster.cluster._config)


def until(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.25)


def spans(collector: Collector) -> dict[str, Received]:
    """Of that chat, once all have come."""
    found: dict[str, Received] = {}

    def complete() -> bool:
        found.update({each.name: each for each in collector.spans if each.trace == f"{CLIENT_TRACE:032x}"})
        return {SERVER, TARGET, DRAFT} <= found.keys()

    until(complete)
    return found


def test_one_trace_goes_from_the_client_through_router_and_target_to_the_draft(
    answered: dict[str, Any], collector: Collector
) -> None:
    found = spans(collector)
    assert found[SERVER].parent == f"{CLIENT_SPAN:016x}"
    assert found[TARGET].parent == found[SERVER].span
    assert found[DRAFT].parent == found[TARGET].span
    services = [found[name].service for name in (SERVER, TARGET, DRAFT)]
    assert services == ["paceline-router", "paceline-target", "paceline-draft"]


def test_a_span_names_what_the_answer_names(answered: dict[str, Any], collector: Collector) -> None:
    about = spans(collector)[SERVER].about
    assert about["gen_ai.response.id"] == answered["id"]
    assert about["paceline.request_id"] == "mine-9"
    assert about["paceline.replica"] == answered["paceline"]["replica_id"] == spans(collector)[TARGET].instance


def test_the_router_s_log_has_a_line_of_json_about_the_request(answered: dict[str, Any]) -> None:
    lines = [line for line in logged() if line.get("completion_id") == answered["id"]]
    ((found),) = [line for line in lines if "completion_tokens" in line]
    ids = (found["request_id"], found["session_id"], found["trace_id"], found["deployment"])
    assert ids == ("mine-9", "traced", f"{CLIENT_TRACE:032x}", f"{NAME}_Router")
    assert (found["completion_tokens"], found["finish_reason"], found["status"]) == (24, "length", "ok")


def logged() -> list[dict[str, Any]]:
    """Every line that the replicas of this application wrote into Serve's files."""
    import ray

    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    files = [file for file in folder.glob("replica_*.log") if NAME in file.name]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
