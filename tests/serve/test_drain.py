"""A node is drained over HTTP while clients ask: its sessions go on elsewhere with their KV, nobody is refused.

One story, told once; each test states one fact of it. Real raylets as nodes, a target on each of two, room for another
on the third. The router is on the node that is drained, and so are a stream and the sessions.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from paceline.config import default_deployment, parse_settings
from paceline.models import ModelFiles
from paceline.serving.environment import HAPROXY, RAY
from tests.serve.conftest import chat_tokens
from tests.serve.several_nodes import ray_of
from tests.serve.test_autoscaling import deployed, ports

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]

SESSIONS = 4
PATIENCE_S = 180.0
SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
STREAMING = "drain-streaming"
LONG: dict[str, Any] = {
    "max_tokens": 3000,  # longer than the other replica takes to start
    "ignore_eos": True,
    "temperature": 0.8,
    "seed": 5,
    "session_id": STREAMING,
}
STORY = "Tell me about " + ", ".join(f"thing number {n}" for n in range(24)) + "."
ARGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "target": {
        "num_replicas": 2,
        "num_cpus": 0.5,
        "resources": {"paceline_target": 1},
        "drain_timeout_s": 3,
        "engine": {"threads": 1, "kv_tokens": 16384},
    },
    "draft": {"num_replicas": 0},
    "speculation": {"enabled": False},
    "router_drain_timeout_s": PATIENCE_S,
}
WORKER = {"CPU": 1, "paceline_target": 1}


@dataclass
class Told:
    """What was seen, before, meanwhile and after."""

    node: str = ""
    accepted: dict[str, Any] = field(default_factory=dict)
    before: list[dict[str, Any]] = field(default_factory=list)
    after: list[dict[str, Any]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    followed: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    streamed: list[int] = field(default_factory=list)
    undisturbed: list[int] = field(default_factory=list)
    resumptions: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)


class Front:
    """The few calls of the server that the story makes."""

    def __init__(self, url: str) -> None:
        self.url = url

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/v1/nodes", timeout=60).raise_for_status().json()["data"]
        return found

    def drain(self, node: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/nodes/{node}/drain", json=body, timeout=60)

    def turn(self, session: str, content: str) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **SHORT}
        return httpx.post(f"{self.url}/v1/sessions/{session}/turns", json=body, timeout=120).raise_for_status()

    def begin(self, session: str, replica: str) -> str:
        """A session on that replica; returns where it is."""
        httpx.post(f"{self.url}/v1/sessions", json={"session_id": session}, timeout=60).raise_for_status()
        self.turn(session, f"My name is {session}. {STORY}")
        moved = httpx.post(f"{self.url}/v1/sessions/{session}/move", json={"replica": replica}, timeout=60)
        return str(moved.raise_for_status().json()["replica_id"])


@pytest.fixture(scope="module")
def told(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("ray")
    with ray_of(folder, {"CPU": 0}, {**RAY, **HAPROXY}) as cluster:
        for _ in range(2):
            cluster.join(WORKER)
        store = {"sessions": {"store": f"sqlite:///{folder}/sessions.db"}}
        config = default_deployment(parse_settings(ARGS | store), **ports())
        with deployed(cluster.address, config) as (url, _):
            cluster.join(WORKER)  # after the router has found its place beside one of the targets
            return asyncio.run(story(Front(url)))


async def story(front: Front) -> Told:
    told = Told(before=front.nodes())
    (node,) = (each for each in told.before if {"router", "target"} <= roles(each))
    told.node, (replica,) = node["node_id"], targets(node)
    told.homes = {name: front.begin(name, replica) for name in (f"drain-{n}" for n in range(SESSIONS))}
    front.begin(STREAMING, replica)
    head = told.before[0]["node_id"]
    told.refused = {name: refusal(front.drain(name)) for name in (head, "nobody")}
    with asking(front, told.answers):
        stream = asyncio.create_task(streamed(front, told))
        await asyncio.wait_for(told.begun.wait(), PATIENCE_S)
        told.accepted = (await asyncio.to_thread(front.drain, told.node)).json()
        await asyncio.to_thread(follow, front, told)
        await stream
        for name in told.homes:
            answer = await asyncio.to_thread(front.turn, name, "And then?")
            usage = answer.json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            route, where = answer.headers["x-paceline-route"], answer.headers["x-paceline-replica"]
            told.followed[name] = route, where, cached
    told.after = front.nodes()
    async with httpx.AsyncClient(base_url=front.url, timeout=300) as client:
        told.undisturbed, _ = await chat_tokens(client, f"{STREAMING}: {STORY}", **LONG)
    return told


async def streamed(front: Front, told: Told) -> None:
    """A long answer on the node that is drained: it belongs to a session there."""
    async with httpx.AsyncClient(base_url=front.url, timeout=300) as client:
        seen = 0

        def count(new: int) -> None:
            nonlocal seen
            seen += new
            if seen > 20:
                told.begun.set()

        told.streamed, info = await chat_tokens(client, f"{STREAMING}: {STORY}", count, **LONG)
        told.resumptions = info.get("resumptions", 0)


def follow(front: Front, told: Told) -> None:
    """Look until nothing is left on the node."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        card = next((each for each in front.nodes() if each["node_id"] == told.node), None)
        if card is None:
            return
        told.looks.append(card)
        if card["empty"]:
            return
        time.sleep(0.5)


@contextmanager
def asking(front: Front, answers: list[int]) -> Iterator[None]:
    """Somebody who asks all the time, on a connection of its own each time."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.2):
            body = {"messages": [{"role": "user", "content": f"Say {len(answers)}."}], **SHORT}
            answers.append(httpx.post(f"{front.url}/v1/chat/completions", json=body, timeout=120).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def roles(node: dict[str, Any]) -> set[str]:
    return {each["role"] for each in node["replicas"]}


def targets(node: dict[str, Any]) -> list[str]:
    return [each["replica_id"] for each in node["replicas"] if each["role"] == "target"]


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_it_begins_with_a_target_on_each_of_two_workers(told: Told) -> None:
    assert sorted(len(targets(node)) for node in told.before) == [0, 0, 1, 1]


def test_neither_the_head_nor_an_unknown_node_is_drained(told: Told) -> None:
    assert sorted(told.refused.values()) == [(404, "node_not_found"), (409, "node_conflict")]


def test_the_answer_to_a_drain_comes_at_once_with_all_still_there(told: Told) -> None:
    card = told.accepted
    assert (card["node_id"], card["state"], card["empty"]) == (told.node, "draining", False)
    assert card["sessions"] >= SESSIONS


def test_the_node_has_nothing_left(told: Told) -> None:
    assert told.looks[-1]["empty"] or told.looks[-1]["state"] == "gone"


def test_its_target_runs_elsewhere(told: Told) -> None:
    where = {node["node_id"]: len(targets(node)) for node in told.after if node["state"] == "running"}
    assert sorted(where.values()) == [0, 1, 1]
    assert told.node not in where


def test_what_is_left_to_hand_over_is_told_meanwhile(told: Told) -> None:
    assert next(card["sessions"] for card in told.looks if card["state"] == "draining") >= SESSIONS
    assert told.looks[-1]["sessions"] == 0


def test_no_request_fails(told: Told) -> None:
    assert len(told.answers) > 5
    assert set(told.answers) == {200}


def test_every_session_goes_on_with_its_kv_at_its_new_holder(told: Told) -> None:
    assert {route for route, _, _ in told.followed.values()} == {"holder"}
    assert all(where != told.homes[name] for name, (_, where, _) in told.followed.items())
    assert all(cached > 100 for _, _, cached in told.followed.values())


def test_a_stream_that_ran_there_goes_on_elsewhere_with_the_same_tokens(told: Told) -> None:
    assert told.resumptions == 1
    assert told.streamed == told.undisturbed
