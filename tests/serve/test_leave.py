"""A host is taken away that has run the hook of its pod: its sessions go on elsewhere with their KV, nobody is refused.

One story, told once; each test states one fact of it. Real raylets as nodes, a target on each of two, and no room for
a third, as in a group of pods that is full: Kubernetes starts the next pod when this one is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from paceline.config import default_deployment, parse_settings
from paceline.models import ModelFiles
from paceline.serving.control_store import ControlStore
from paceline.serving.environment import HAPROXY, RAY
from tests.serve.fake_nodes import STOP_TIMEOUT_S
from tests.serve.several_nodes import SeveralNodes, ray_of, worker_name
from tests.serve.test_autoscaling import deployed, ports
from tests.serve.test_drain import ARGS, WORKER, Front, asking, roles, targets

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

SESSIONS = 4
WITHIN_S = 70.0
SETTINGS: dict[str, Any] = {**ARGS, "router_drain_timeout_s": 5}
COMMAND = [sys.executable, "-c", "from paceline.cli.app import main; main()", "leave", f"--within={WITHIN_S:g}"]


@dataclass
class Told:
    """What was seen."""

    hook: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    code: int = -1
    again: list[str] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    answers: list[int] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    followed: dict[str, tuple[str, str, int]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def told(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("ray")
    with ray_of(folder, {"CPU": 0}, {**RAY, **HAPROXY}) as cluster:
        for _ in range(2):
            cluster.join(WORKER)
        sessions = {"store": f"sqlite:///{folder / 'sessions'}"}  # the router that knows their histories leaves too
        config = default_deployment(parse_settings({**SETTINGS, "sessions": sessions}), **ports())
        with deployed(cluster.address, config) as (url, _):
            yield story(Front(url), cluster, folder / "container.log")


def story(front: Front, cluster: SeveralNodes, log: Path) -> Told:
    told = Told()
    (node,) = (each for each in front.nodes() if {"router", "target"} <= roles(each))
    (replica,) = targets(node)
    told.homes = {name: front.begin(name, replica) for name in (f"leave-{n}" for n in range(SESSIONS))}
    store = ControlStore(cluster.address)
    name = store.nodes()[node["node_id"]].instance_id
    with asking(front, told.answers):
        hook = run_hook(cluster.address, name, log)
        told.code, told.hook, told.log = hook.returncode, hook.stdout.splitlines(), log.read_text().splitlines()
        told.left = {each for each in store.actors(node["node_id"]) if each}
        told.again = run_hook(cluster.address, name, log).stdout.splitlines()
        (number,) = (n for n in range(len(cluster.workers)) if worker_name(n) == name)
        kill(cluster.workers[number])
        for session in told.homes:
            told.followed[session] = follow_up(front, session)
    return told


def run_hook(address: str, name: str, log: Path) -> subprocess.CompletedProcess[str]:
    """As Kubernetes does in a worker's container, whose environment KubeRay has made."""
    variables = {**os.environ, **RAY, "RAY_ADDRESS": address, "RAY_CLOUD_INSTANCE_ID": name}
    command = [*COMMAND, f"--log={log}"]
    return subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, timeout=2 * WITHIN_S, check=False)


def kill(worker: subprocess.Popen[bytes]) -> None:
    """It and all it has started, at once."""
    if worker.poll() is None:
        for process in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
            process.kill()
    worker.wait(STOP_TIMEOUT_S)


def follow_up(front: Front, session: str) -> tuple[str, str, int]:
    """Why it went where, and how much it found there."""
    answer = front.turn(session, "And then?")
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer.headers["x-paceline-route"], answer.headers["x-paceline-replica"], cached


def test_the_hook_ends_well_with_nothing_left(told: Told) -> None:
    assert (told.code, told.hook[-1]) == (0, "leave: nothing is left here")
    assert told.left == set()


def test_it_says_what_is_left_meanwhile(told: Told) -> None:
    assert told.hook[:2] == [f"leave: draining, for {WITHIN_S:g} s at most", "leave: left here: 1 router, 1 target"]


def test_its_lines_are_in_the_containers_log(told: Told) -> None:
    assert told.log == told.hook


def test_a_second_run_finds_it_done(told: Told) -> None:
    assert told.again[-1].endswith(("nothing is left here", "it has left already, or never joined"))


def test_no_request_fails_while_the_node_empties_and_dies(told: Told) -> None:
    assert len(told.answers) > 5
    assert set(told.answers) == {200}


def test_every_session_goes_on_with_its_kv_at_the_other_target(told: Told) -> None:
    assert {route for route, _, _ in told.followed.values()} == {"holder"}
    assert all(where != told.homes[name] for name, (_, where, _) in told.followed.items())
    assert all(cached > 100 for _, _, cached in told.followed.values())
