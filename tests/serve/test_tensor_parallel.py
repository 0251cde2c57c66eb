"""A model on two ranks behind Ray Serve: the tokens of one rank, and a service that outlives its ranks.

A second application on the session's cluster, with one target and one draft of two ranks each, all real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from paceline.serving.cluster import Endpoints, LocalCluster
from tests.serve.conftest import Server, chat_all, chat_tokens

pytestmark = [pytest.mark.serve, pytest.mark.slow]  # a second application: a minute to start

NAME = "two-ranks"
RANKS = {"num_replicas": 1, "num_cpus": 0.1}
ENGINE = {"threads": 1, "kv_tokens": 8192, "tensor_parallel_size": 2, "collective_timeout_s": 10}
PROMPTS = [
    "What is the capital of Portugal?",
    "Explain how a bicycle stays upright.",
    "Write a haiku about the sea.",
    "List three uses of copper.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
]
FULL: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
GREEDY: dict[str, Any] = {"temperature": 0, **FULL}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 42, **FULL}
PATIENCE_S = 120.0


def apply(config: dict[str, Any]) -> None:
    """What `serve deploy` does."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)


def with_application(cluster: LocalCluster, **args: Any) -> dict[str, Any]:
    """The session's config with another application beside its own, whatever that was scaled to."""
    config = copy.deepcopy(cluster._config)
    (own,) = config["applications"]
    other = {**copy.deepcopy(own), "name": NAME, "route_prefix": f"/{NAME}"}
    other.pop("deployments", None)
    config["applications"].append(other)
    config["applications"][1]["args"] |= args
    return config


def wait_for_status(*wanted: str) -> Any:
    """The second application's, once it is one of these."""
    from ray import serve

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = serve.status().applications.get(NAME)
        if found is not None and found.status in wanted:
            return found
        time.sleep(0.25)
    raise AssertionError(f"still not {wanted} after {PATIENCE_S} s: {found}")


@contextlib.contextmanager
def deployed(cluster: Server, **args: Any) -> Iterator[None]:
    apply(with_application(cluster.cluster, **args))
    try:
        yield
    finally:
        apply(cluster.cluster._config)


@pytest.fixture(scope="module")
def two_ranks(cluster: Server) -> Iterator[Server]:
    draft = {"model": "smollm2-135m-draft", "host": "127.0.0.1", **RANKS, "engine": ENGINE}
    with deployed(cluster, target={**RANKS, "drain_timeout_s": 2, "engine": ENGINE}, draft=draft):
        assert wait_for_status("RUNNING", "DEPLOY_FAILED").status == "RUNNING"
        yield Server(Endpoints(f"{cluster.endpoints.http}/{NAME}", cluster.endpoints.grpc), cluster.cluster)


@pytest.fixture
def server(two_ranks: Server) -> Server:
    """With all its replicas up, whatever the test before did to them."""
    two_ranks.wait_for(whole)
    return two_ranks


def whole(status: dict[str, Any]) -> bool:
    """One target, one draft, and the one knows the other."""
    connected = [target["drafters_connected"] for target in status["targets"]]
    return connected == [1] and len(status["drafts"]) == 1


@pytest.fixture(scope="module")
def one_rank(cluster: Server) -> dict[str, list[list[int]]]:
    """What the session's own application answers, where each replica is one process."""
    return {
        kind: [tokens for tokens, _ in asyncio.run(chat_all(cluster, PROMPTS, speculation=False, **options))]
        for kind, options in (("greedy", GREEDY), ("seeded", SEEDED))
    }


@pytest.mark.slow
async def test_two_ranks_answer_as_one_without_speculation(server: Server, one_rank: dict[str, Any]) -> None:
    answers = await chat_all(server, PROMPTS, speculation=False, **GREEDY)
    assert [tokens for tokens, _ in answers] == one_rank["greedy"]


async def test_two_ranks_answer_as_one_with_a_draft_of_two_ranks(server: Server, one_rank: dict[str, Any]) -> None:
    answers = await chat_all(server, PROMPTS, **GREEDY)
    assert [tokens for tokens, _ in answers] == one_rank["greedy"]
    assert sum(info["accepted_tokens"] for _, info in answers) > 0


@pytest.mark.slow
async def test_two_ranks_draw_as_one(server: Server, one_rank: dict[str, Any]) -> None:
    answers = await chat_all(server, PROMPTS, **SEEDED)
    assert [tokens for tokens, _ in answers] == one_rank["seeded"]


@pytest.mark.slow
def test_status_tells_of_every_rank(server: Server) -> None:
    status = server.status()
    for replica in (*status["targets"], *status["drafts"]):
        assert replica["tensor_parallel_size"] == 2
        assert [each["rank"] for each in replica["ranks"]] == [0, 1]
        assert replica["ranks"][0]["pid"] == replica["pid"] != replica["ranks"][1]["pid"]


@pytest.mark.parametrize(
    ("rank", "end"),
    [
        pytest.param(1, signal.SIGKILL, id="worker-killed"),
        pytest.param(0, signal.SIGKILL, id="replica-killed", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, id="worker-hangs", marks=pytest.mark.slow),
    ],
)
async def test_every_stream_outlives_a_rank_of_the_only_target(
    server: Server, one_rank: dict[str, Any], rank: int, end: signal.Signals
) -> None:
    victim, answers = await _answers_without_a_rank(server, rank, end)
    assert [tokens for tokens, _ in answers] == one_rank["greedy"]
    assert [info["resumptions"] for _, info in answers] == [1] * len(PROMPTS)
    after = server.wait_for(whole)["targets"][0]
    assert after["replica_id"] != victim["replica_id"]
    assert not {each["pid"] for each in victim["ranks"]} & {each["pid"] for each in after["ranks"]}
    await asyncio.gather(*(_gone(each["pid"]) for each in victim["ranks"]))


@pytest.mark.slow
async def test_no_stream_notices_a_killed_rank_of_the_draft(server: Server, one_rank: dict[str, Any]) -> None:
    victim = server.status()["drafts"][0]
    os.kill(victim["ranks"][1]["pid"], signal.SIGKILL)
    answers = await chat_all(server, PROMPTS, **GREEDY)
    assert [tokens for tokens, _ in answers] == one_rank["greedy"]
    server.wait_for(lambda status: whole(status) and status["drafts"][0]["replica_id"] != victim["replica_id"])


async def _answers_without_a_rank(
    server: Server, rank: int, end: signal.Signals
) -> tuple[dict[str, Any], list[tuple[list[int], dict[str, Any]]]]:
    """Answer all prompts; once a quarter of the tokens is there, the target's rank gets that signal."""
    produced, due = 0, asyncio.Event()

    def count(new: int) -> None:
        nonlocal produced
        produced += new
        if produced >= len(PROMPTS) * FULL["max_tokens"] // 4:
            due.set()

    victim = server.status()["targets"][0]
    async with httpx.AsyncClient(base_url=server.endpoints.http, timeout=PATIENCE_S) as client:
        running = [asyncio.create_task(chat_tokens(client, prompt, count, **GREEDY)) for prompt in PROMPTS]
        await asyncio.wait_for(due.wait(), PATIENCE_S)
        os.kill(victim["ranks"][rank]["pid"], end)
        return victim, await asyncio.gather(*running)


async def _gone(pid: int) -> None:
    """Wait until there is no such process."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (
            {"engine": {"tensor_parallel_size": 7}},
            "target.engine.tensor_parallel_size: 7 ranks cannot share 9 query heads over 3 KV heads",
        ),
        (
            {"num_cpus": 1000, "engine": {"tensor_parallel_size": 2}},
            "target.num_cpus: 2 ranks with 1000 CPUs each must be on one host",
        ),
    ],
    ids=["heads", "bundles"],
)
def test_ranks_that_cannot_work_are_refused_with_the_reason(
    cluster: Server, target: dict[str, Any], reason: str
) -> None:
    with deployed(cluster, target={**RANKS, **target}):
        refused = wait_for_status("RUNNING", "DEPLOY_FAILED")
        assert (refused.status, reason in refused.message) == ("DEPLOY_FAILED", True)
