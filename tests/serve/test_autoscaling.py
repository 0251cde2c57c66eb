"""A burst on a cluster that grows: targets, drafts and nodes follow it, and go again; nobody is refused or lost.

One story, told once; each test states one fact of it. Real raylets as nodes, real replicas, the real policy in Serve's
controller. Minutes on two cores: every target takes half of one to start.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from paceline.config import default_deployment, parse_settings
from paceline.models import ModelFiles
from paceline.serving.cluster import scaled
from paceline.serving.environment import RAY
from tests.serve.conftest import free_port
from tests.serve.fake_nodes import autoscaling_ray, nodes

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]

USERS = 12
PATIENCE_S = 240.0
ARGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "target": {
        "num_replicas": 1,
        "num_cpus": 1,
        "drain_timeout_s": 5,
        "engine": {"threads": 1, "kv_tokens": 16384, "max_num_seqs": 4},
    },
    "draft": {"num_replicas": 1, "num_cpus": 0.25, "engine": {"threads": 1, "kv_tokens": 16384}},
    "speculation": {"depth": 4, "draft_timeout_ms": 5000, "synthetic_acceptance": 0.8},
    "autoscaling": {
        "enabled": True,
        "preset": "latency",
        "downscale_delay_s": 15,
        "target": {"max_replicas": 3},
        # All replicas share two cores here, so that what drafts save is not what this is about.
        "draft": {"min_replicas": 1, "max_replicas": 2, "min_gain": 0, "utilization": 0.3},
    },
}
"""The head has room for a router, a target and the drafts; each further target takes a node of its own."""

Sizes = dict[str, int]


@dataclass
class Story:
    """What was seen: the sizes at each look, the status of every answer, what was told in the end."""

    first: Sizes
    most: Sizes = field(default_factory=dict)
    last: Sizes = field(default_factory=dict)
    answers: list[int] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    metrics: str = ""
    log: str = ""

    def see(self, sizes: Sizes) -> None:
        self.last = sizes
        self.most = {name: max(count, self.most.get(name, 0)) for name, count in sizes.items()}


@pytest.fixture(scope="module")
def story(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("ray")
    resources = {"head": {"CPU": 2}, "worker": {"CPU": 1}}
    with (
        autoscaling_ray(folder, **resources, max_workers=2, idle_s=6, environment=RAY) as address,
        deployed(address, scaled(default_deployment(parse_settings(ARGS), **ports()))) as (url, session),
    ):
        story = Story(sizes(url, address))
        with crowd(url, story.answers):
            follow(story, url, address, {"targets": 3, "nodes": 2, "drafts": 2})
        follow(story, url, address, {"targets": 1, "nodes": 0, "drafts": 1})
        story.decisions = httpx.get(f"{url}/status", timeout=30).json()["autoscaling"]["decisions"]
        story.metrics = httpx.get(f"{url}/metrics", timeout=30).text
        story.log = "".join(path.read_text() for path in (session / "logs" / "serve").glob("controller*.log"))
    return story


def ports() -> dict[str, int]:
    return {"http_port": free_port(), "grpc_port": free_port()}


@contextmanager
def deployed(address: str, config: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Its URL, and the folder of the Ray session."""
    command = [sys.executable, "-m", "tests.serve.deploying", address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **RAY}
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(config), file=process.stdin, flush=True)
        session = process.stdout.readline().strip()
        assert session, "it did not come up"
        yield f"http://127.0.0.1:{config['http_options']['port']}", Path(session)
        process.stdin.close()


@contextmanager
def crowd(url: str, answers: list[int]) -> Iterator[None]:
    """Users who ask again as soon as they have an answer; all have their last one when this ends."""
    over = threading.Event()

    def user(number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"Tell me about the number {number}."}], "max_tokens": 64}
        with httpx.Client(base_url=url, timeout=300) as client:
            while not over.is_set():
                answers.append(client.post("/v1/chat/completions", json=body).status_code)

    users = [threading.Thread(target=user, args=(number,)) for number in range(USERS)]
    for each in users:
        each.start()
    try:
        yield
    finally:
        over.set()
        for each in users:
            each.join()


def follow(story: Story, url: str, address: str, wanted: Sizes) -> None:
    """Look until all sizes have been as wanted at once."""
    deadline = time.monotonic() + PATIENCE_S
    while story.last != wanted and time.monotonic() < deadline:
        time.sleep(1)
        story.see(sizes(url, address))


def sizes(url: str, address: str) -> Sizes:
    status = httpx.get(f"{url}/status", timeout=30).json()
    return {"targets": len(status["targets"]), "drafts": len(status["drafts"]), "nodes": nodes(address)}


def test_it_begins_small(story: Story) -> None:
    assert story.first == {"targets": 1, "drafts": 1, "nodes": 0}


def test_a_burst_brings_targets_drafts_and_nodes(story: Story) -> None:
    assert story.most == {"targets": 3, "drafts": 2, "nodes": 2}


def test_everything_returns(story: Story) -> None:
    assert story.last == {"targets": 1, "drafts": 1, "nodes": 0}


def test_no_request_fails(story: Story) -> None:
    assert set(story.answers) == {200}


def test_every_change_has_a_reason_in_a_log_line(story: Story) -> None:
    told = [f"autoscaling: {each['pool']} {each['before']} -> {each['replicas']}, " for each in story.decisions]
    assert len(told) >= 4  # two pools, up and down
    for line, each in zip(told, story.decisions, strict=True):
        assert f"{line}{each['reason']}: {each['text']}" in story.log


def test_every_change_is_counted_by_its_reason(story: Story) -> None:
    found = re.findall(
        r'^paceline_autoscaling_decisions_total\{.*pool="(\w+)",reason="(\w+)",direction="(\w+)"\} (\S+)',
        story.metrics,
        re.MULTILINE,
    )
    counted = {(pool, reason, direction): float(count) for pool, reason, direction, count in found if float(count)}
    expected: dict[tuple[str, str, str], float] = {}
    for each in story.decisions:
        key = each["pool"], each["reason"], "up" if each["replicas"] > each["before"] else "down"
        expected[key] = expected.get(key, 0) + 1
    assert counted == expected


@pytest.mark.parametrize("name", ["paceline_autoscaling_signal", "paceline_synthetic_acceptance"])
def test_what_only_such_a_server_has_is_in_its_scrape(story: Story, name: str) -> None:
    assert f"\n{name}{{" in story.metrics


def test_the_policy_never_failed(story: Story) -> None:
    assert re.search(r"^paceline_autoscaling_errors_total\{.*\} 0\.0$", story.metrics, re.MULTILINE)
