"""One real cluster for the whole session: Ray, 1 router, 2 targets, 2 drafts, SmolLM2 in each."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from paceline.config import default_deployment, parse_settings
from paceline.models import ModelFiles
from paceline.serving.cluster import Endpoints, LocalCluster

ARGS = {
    "target": {"num_cpus": 0.1, "drain_timeout_s": 2, "engine": {"threads": 1, "kv_tokens": 16384}},
    "draft": {"num_cpus": 0.1, "engine": {"threads": 1, "kv_tokens": 16384}},
    "sessions": {"kv_host_gib": 0.01},  # so that there is a tier to tell of
    # Four replicas on two busy cores: a candidate may take its time, the tests are about tokens.
    "speculation": {"depth": 4, "draft_timeout_ms": 10_000},
}


@dataclass(frozen=True)
class Server:
    """A running cluster, and the few calls the tests make of it."""

    endpoints: Endpoints
    cluster: LocalCluster

    def get(self, path: str) -> Any:
        return httpx.get(self.endpoints.http + path, timeout=30).raise_for_status().json()

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.endpoints.http + path, json=body, timeout=120)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("/status")
        return status

    def wait_for(self, fact: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> dict[str, Any]:
        """Poll /status until `fact` holds of it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            if fact(status):
                return status
            time.sleep(0.25)
        raise AssertionError(f"still not so after {timeout_s} s: {status}")


def whole(status: dict[str, Any]) -> bool:
    """Two targets, two drafts, every target connected to every draft."""
    targets = status["targets"]
    connected = [target["drafters_connected"] for target in targets]
    return len(targets) == 2 and len(status["drafts"]) == 2 and connected == [2, 2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def cluster(smollm2: ModelFiles) -> Iterator[Server]:
    settings = parse_settings({"model": "smollm2-135m", **ARGS})
    deployment = default_deployment(settings, http_port=free_port(), grpc_port=free_port())
    cluster = LocalCluster(deployment)
    with cluster as endpoints:
        yield Server(endpoints, cluster)


@pytest.fixture
def server(cluster: Server) -> Server:
    """The cluster with all its replicas up, whatever the test before did to them."""
    cluster.wait_for(whole)
    return cluster


async def chat_tokens(
    client: httpx.AsyncClient, content: str, on_tokens: Callable[[int], None] = lambda _: None, **options: Any
) -> tuple[list[int], dict[str, Any]]:
    """Stream one chat; its token ids and the `paceline` object of the last chunk."""
    import json

    body = {"messages": [{"role": "user", "content": content}], "stream": True, "return_token_ids": True, **options}
    tokens: list[int] = []
    last: dict[str, Any] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            new = (chunk.get("paceline") or {}).get("token_ids") or []
            tokens += new
            on_tokens(len(new))
            last = chunk.get("paceline") or last
    return tokens, last


async def chat_all(server: Server, prompts: list[str], **options: Any) -> list[tuple[list[int], dict[str, Any]]]:
    """All prompts at once."""
    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=300) as client:
        return await asyncio.gather(*(chat_tokens(client, prompt, **options) for prompt in prompts))
