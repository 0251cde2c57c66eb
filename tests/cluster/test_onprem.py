"""The real launcher file, over SSH, on three hosts: up, serving across them, a host lost and back, down.

About five minutes on two cores, 5 GB. `pytest -m netns tests/cluster/test_onprem.py`, as root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from paceline.models import ModelFiles
from tests.cluster.lab import ADDRESSES, ROOT, Lab, missing

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=f"no lab of hosts here: {missing()}"),
]

UP_TIMEOUT_S = 280
SERVE_TIMEOUT_S = 180
HEAD, TARGET_HOST, DRAFT_HOST = ADDRESSES
URL = f"http://{ADDRESSES[HEAD]}:8000"


class Onprem:
    """The lab with the cluster file on it, and the commands a user would give."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.file = str(lab.cluster_file())

    def paceline(self, *words: str, timeout: float = UP_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        entry = "from paceline.cli.app import main; main()"
        return self.lab.run([sys.executable, "-c", entry, "cluster", *words], timeout)

    def hosts(self) -> dict[str, dict[str, Any]]:
        """By name, what `paceline cluster status` says."""
        found = json.loads(self.paceline("status", self.file, "--json", timeout=90).stdout)
        return {name: each for name, address in ADDRESSES.items() for each in found if each["host"] == address}

    def ray(self, *words: str) -> str:
        done = self.lab.run([sys.executable, "-m", "ray.scripts.scripts", *words], 120)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def deploy(self) -> None:
        self.ray("rsync-up", self.file, str(ROOT / "deployments" / "onprem.yaml"), "~/deployment.yaml")
        self.ray("exec", self.file, "serve deploy ~/deployment.yaml")

    def status(self) -> dict[str, Any]:
        with self.lab.network(), httpx.Client(timeout=10) as client:
            answer = client.get(f"{URL}/status")
        return dict(answer.json()) if answer.status_code == 200 else {"targets": [], "drafts": []}

    def replicas(self) -> dict[str, list[str]]:
        """Names of the hosts that have them."""
        try:
            found = self.status()
        except httpx.HTTPError:
            return {"targets": [], "drafts": []}
        return {role: sorted(each.get("host", "?") for each in found[role]) for role in ("targets", "drafts")}

    def chat(self, question: str, on_token: Callable[[int], None] = lambda _: None, **more: Any) -> dict[str, Any]:
        """A streamed answer: its text, and what the last frame says of it."""
        body = {
            "model": "smollm2-135m", "messages": [{"role": "user", "content": question}], "temperature": 0.8,
            "seed": 7, "max_tokens": 160, "stream": True, **more,
        }  # fmt: skip
        text, facts, count = "", {}, 0
        with (
            self.lab.network(),
            httpx.Client(timeout=150) as client,
            client.stream("POST", f"{URL}/v1/chat/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                frame = json.loads(line.removeprefix("data: "))
                assert "error" not in frame, frame
                facts |= frame.get("paceline") or {}
                for choice in frame["choices"]:
                    text += choice["delta"].get("content") or ""
                count += 1
                on_token(count)
        return {"text": text, **facts}


def wait_until(what: Callable[[], bool], timeout_s: float, shown: Callable[[], object]) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, shown()
        time.sleep(2)


@pytest.fixture(scope="module")
def onprem(smollm2: ModelFiles) -> Iterator[Onprem]:
    with Lab() as lab:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(lab.wheels), str(ROOT)], check=True
        )
        yield Onprem(lab)


def test_a_cluster_over_ssh(onprem: Onprem) -> None:
    """One life of one cluster: each part needs the one before it, and bringing it up takes a minute."""
    up(onprem)
    serves_across_hosts(onprem)
    an_answer_outlives_the_drafts_host(onprem)
    an_answer_outlives_its_targets_host(onprem)
    down(onprem)


def up(onprem: Onprem) -> None:
    done = onprem.paceline("up", onprem.file, "--timeout", "240")
    assert done.returncode == 0, done.stdout[-3000:]
    assert {name: (each["joined"], each["ray_runs"]) for name, each in onprem.hosts().items()} == dict.fromkeys(
        ADDRESSES, (True, True)
    )
    before = raylets(onprem)
    again = onprem.paceline("up", onprem.file)
    assert again.returncode == 0, again.stdout
    assert raylets(onprem) == before


def raylets(onprem: Onprem) -> dict[str, list[str]]:
    """Each host's, with their process ids."""
    return {
        name: [process for process in each["processes"] if "/raylet/raylet " in process]
        for name, each in onprem.hosts().items()
    }


def serves_across_hosts(onprem: Onprem) -> None:
    onprem.deploy()
    wanted = {"targets": sorted((HEAD, TARGET_HOST)), "drafts": [DRAFT_HOST]}
    wait_until(lambda: onprem.replicas() == wanted, SERVE_TIMEOUT_S, onprem.replicas)
    wait_until(lambda: all(each["drafters_connected"] == 1 for each in onprem.status()["targets"]), 60, onprem.status)
    found = onprem.status()
    assert sorted(each["node_ip"] for each in found["targets"] + found["drafts"]) == sorted(ADDRESSES.values())
    # How deep to draft is decided by what is measured: on a busy machine a short answer may have no drafts at all.
    answers: list[dict[str, Any]] = []

    def drafted_elsewhere() -> bool:
        answers.append(onprem.chat("What is the capital of France?"))
        return bool(sum(answers[-1].get("sources", {}).get("remote", {}).get("accepted", ())))

    wait_until(drafted_elsewhere, 90, lambda: answers)
    with_drafts = answers[-1]
    alone = onprem.chat("What is the capital of France?", speculation=False)
    assert alone["drafted_tokens"] == 0
    assert with_drafts["text"] == alone["text"]


def an_answer_outlives_the_drafts_host(onprem: Onprem) -> None:
    question = "Tell me a long story about a river."
    expected = onprem.chat(question)["text"]
    found = onprem.chat(question, on_token=lambda count: onprem.lab.lose(DRAFT_HOST) if count == 5 else None)
    assert found["text"] == expected
    wait_until(lambda: not onprem.hosts()[DRAFT_HOST]["joined"], 120, onprem.hosts)
    lost = onprem.hosts()[DRAFT_HOST]
    assert lost["problem"] is not None
    assert onprem.paceline("status", onprem.file, timeout=90).returncode == 1
    onprem.lab.start(DRAFT_HOST)
    back = onprem.paceline("up", onprem.file, "--timeout", "120")
    assert back.returncode == 0, back.stdout[-3000:]
    wait_until(lambda: onprem.replicas()["drafts"] == [DRAFT_HOST], SERVE_TIMEOUT_S, onprem.hosts)


def an_answer_outlives_its_targets_host(onprem: Onprem) -> None:
    """Of some sessions the one whose target is not the head's, which no cluster outlives."""
    question = "Tell me a long story about a mountain."
    expected = onprem.chat(question)["text"]
    there = {each["replica_id"] for each in onprem.status()["targets"] if each["host"] == TARGET_HOST}
    sessions = (f"session-{index}" for index in range(20))
    session = next(each for each in sessions if onprem.chat("Hi", session_id=each)["replica_id"] in there)
    found = onprem.chat(
        question,
        on_token=lambda count: onprem.lab.lose(TARGET_HOST) if count == 5 else None,
        session_id=session,
    )
    assert found["text"] == expected
    assert (found["replica_id"] in there, found["resumptions"]) == (True, 1)
    wait_until(lambda: onprem.replicas()["targets"] == [HEAD], 120, onprem.replicas)
    assert onprem.chat(question)["text"] == expected


def down(onprem: Onprem) -> None:
    """With one host lost it says that it knows nothing of that one; then with all hosts there."""
    partly = onprem.paceline("down", onprem.file)
    assert partly.returncode == 1
    assert f"{ADDRESSES[TARGET_HOST]}: not reached" in partly.stdout
    onprem.lab.start(TARGET_HOST)
    done = onprem.paceline("down", onprem.file)
    assert done.returncode == 0, done.stdout
    for name in ADDRESSES:
        left = [line for line in onprem.lab.processes(name).splitlines() if "ray" in line]
        assert left == []
    onprem.lab.close()
    assert onprem.lab.spaces() == []
