from __future__ import annotations

import socket

import pytest

from paceline.config import default_deployment, parse_settings
from paceline.errors import ConfigError, ModelError
from paceline.ports import free_ports
from tests.cli.conftest import Outcome, Run
from tests.cli.fakes import FakeCluster


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options for two free ports; Ctrl-C comes as soon as the server waits for it."""
    monkeypatch.setattr("paceline.cli.cluster.wait_for_interrupt", lambda: None)
    http, grpc = free_ports(2)
    return "--port", str(http), "--grpc-port", str(grpc)


@pytest.fixture
def served(run: Run, cluster: FakeCluster, ports: tuple[str, ...]) -> Outcome:
    return run("serve", *ports)


def test_a_server_that_was_stopped_exits_with_0(served: Outcome) -> None:
    assert served.code == 0


def test_the_url_is_printed(served: Outcome, cluster: FakeCluster) -> None:
    assert f"HTTP  {cluster.endpoints.http}  (OpenAI-compatible)" in served.out


def test_a_curl_is_printed_in_full(served: Outcome, cluster: FakeCluster) -> None:
    body = '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    url = f"{cluster.endpoints.http}/v1/chat/completions"
    assert f"  curl {url} -H 'content-type: application/json' \\\n    -d '{body}'\n" in served.out


def test_the_way_to_chat_is_printed(served: Outcome, cluster: FakeCluster) -> None:
    assert f"paceline chat --url {cluster.endpoints.http}" in served.out


def test_progress_is_one_line_each_in_a_log(served: Outcome) -> None:
    assert "deploying\n" in served.out


def test_the_cluster_is_stopped(served: Outcome, cluster: FakeCluster) -> None:
    assert cluster.stopped == 1


def test_the_default_is_deployed_with_the_options(run: Run, cluster: FakeCluster, ports: tuple[str, ...]) -> None:
    run("serve", *ports, "--model", "m", "--drafts", "1", "--targets", "3", "--host", "localhost")
    settings = parse_settings({"model": "m", "draft": {"num_replicas": 1}, "target": {"num_replicas": 3}})
    assert cluster.deployment == default_deployment(
        settings, host="localhost", http_port=int(ports[1]), grpc_port=int(ports[3])
    )


def test_the_model_is_made_ready_before_the_start(
    run: Run, cluster: FakeCluster, ports: tuple[str, ...], resolved: list[str]
) -> None:
    cluster.on_start = lambda: resolved.append("started")
    run("serve", *ports, "--model", "m")
    assert resolved == ["m", "started"]


def test_a_model_that_cannot_be_had_starts_nothing(
    run: Run, cluster: FakeCluster, ports: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, progress: object) -> None:
        raise ModelError(f"{name}: no such model")

    monkeypatch.setattr("paceline.models.resolve", missing)
    outcome = run("serve", *ports, "--model", "m")
    assert (outcome.err, cluster.deployment) == ("error: m: no such model\n", None)


def test_a_taken_port_starts_nothing(run: Run, cluster: FakeCluster, resolved: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outcome = run("serve", "--port", str(listener.getsockname()[1]))
    assert (outcome.code, resolved, cluster.deployment) == (1, [], None)


def test_a_failed_start_is_one_line(run: Run, cluster: FakeCluster, ports: tuple[str, ...]) -> None:
    def fail() -> None:
        raise ConfigError("target.num_gpus: no GPU here", param="target.num_gpus")

    cluster.on_start = fail
    assert run("serve", *ports).err == "error: target.num_gpus: no GPU here\n"


def test_a_failed_start_is_cleaned_up(run: Run, cluster: FakeCluster, ports: tuple[str, ...]) -> None:
    def fail() -> None:
        raise ConfigError("target.num_gpus: no GPU here", param="target.num_gpus")

    cluster.on_start = fail
    run("serve", *ports)
    assert cluster.stopped == 1


def test_ctrl_c_during_the_start_exits_with_130(run: Run, cluster: FakeCluster, ports: tuple[str, ...]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    cluster.on_start = interrupt
    assert run("serve", *ports).code == 130


def test_a_missing_config_is_one_line(run: Run, cluster: FakeCluster) -> None:
    assert run("serve", "nowhere.yaml").err == "error: nowhere.yaml: no such config file\n"


def test_a_server_without_keys_warns(served: Outcome) -> None:
    assert "WARNING: there are no API keys" in served.out
