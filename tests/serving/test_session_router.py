"""Ray Serve's hook without a cluster: what it makes of replicas, their stats and requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest, ReplicaQueueLengthCache
from ray.serve._private.request_router.request_router import RequestRouter

from paceline.serving.routing import SessionRouter
from paceline.sessions.handoff import Bound, Move
from paceline.sessions.placement import Route
from paceline.sessions.prefixes import sketch
from paceline.types import Request, SamplingParams

DEPLOYMENT = DeploymentID(name="Target", app_name="paceline")
PROMPT = tuple(range(640))


class Replica:
    """As much of a RunningReplica as the router looks at."""

    def __init__(self, name: str, **stats: Any) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats = stats


def router(*replicas: Replica, mode: str = "soft") -> SessionRouter:
    """Ray's part is left out but for its count of queued requests."""
    made = SessionRouter.__new__(SessionRouter)
    made._replica_queue_len_cache = ReplicaQueueLengthCache()
    made.initialize_state(mode=mode)  # type: ignore[arg-type]
    told = RequestRouter.update_replicas
    RequestRouter.update_replicas = lambda *_: None
    try:
        made.update_replicas(list(replicas))
    finally:
        RequestRouter.update_replicas = told
    return made


def pending(session: str = "", tokens: tuple[int, ...] = (1, 2), name: str = "r", **options: Any) -> PendingRequest:
    request = Request(name, tokens, SamplingParams(), session or None, **options)
    metadata = RequestMetadata(request_id="outer", internal_request_id=name, session_id=session)
    return PendingRequest(args=[request, Route()], kwargs={}, metadata=metadata)


async def choose(chooser: SessionRouter, asked: PendingRequest, *replicas: Replica) -> tuple[str, str]:
    """The first replica and the reason."""
    ranks = await chooser.choose_replicas(list(replicas), asked)
    assert asked.args[1].replica == ranks[0][0].replica_id.unique_id
    return asked.args[1].replica, asked.args[1].reason


async def test_a_session_stays_where_it_was_accepted() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    by.on_request_routed(pending("s"), b.replica_id, None)
    assert {await choose(by, pending("s", name=str(n)), a, b) for n in range(3)} == {("b", "holder")}


async def test_a_restarted_router_finds_sessions_in_the_stats() -> None:
    a, b = Replica("a"), Replica("b", sessions=["s"])
    assert await choose(router(a, b), pending("s"), a, b) == ("b", "holder")


async def test_a_session_whose_replica_is_gone_goes_where_its_prefix_is() -> None:
    a, b, c = Replica("a"), Replica("b"), Replica("c", prefixes=sketch([PROMPT]))
    by = router(a, b, c)
    by.on_request_routed(pending("s", PROMPT), b.replica_id, None)
    assert await choose(by, pending("s", (*PROMPT, 1)), a, c) == ("c", "holder_gone")


async def test_a_session_that_was_handed_over_is_found_where_it_is_told_of() -> None:
    a, b, c = Replica("a"), Replica("b"), Replica("c", sessions=["s"])
    by = router(a, c)
    by.on_request_routed(pending("s"), b.replica_id, None)
    assert await choose(by, pending("s"), a, c) == ("c", "holder")


async def test_a_prefix_told_in_the_stats_is_found() -> None:
    a, b = Replica("a"), Replica("b", prefixes=sketch([PROMPT]))
    assert await choose(router(a, b), pending(tokens=(*PROMPT, 7)), a, b) == ("b", "prefix")


async def test_a_prefix_routed_a_moment_ago_is_found_before_any_stats() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    by.on_request_routed(pending("s", PROMPT), b.replica_id, None)
    fork = pending("fork", (*PROMPT[:600], 7), name="f")
    assert await choose(by, fork, a, b) == ("b", "prefix")


async def test_a_burst_spreads_though_nobody_accepted_yet() -> None:
    replicas = [Replica(name) for name in "abc"]
    by = router(*replicas)
    chosen = Counter([(await choose(by, pending(name=str(n)), *replicas))[0] for n in range(99)])
    assert chosen == {"a": 33, "b": 33, "c": 33}


async def test_requests_that_ended_do_not_count() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    for n in range(8):
        by.on_request_routed(pending(name=str(n)), a.replica_id, None)
    assert {(await choose(by, pending(name=f"x{n}"), a, b))[0] for n in range(4)} == {"b"}
    for n in range(8):
        by.on_request_completed(a.replica_id, str(n))
    assert (await choose(by, pending(name="y"), a, b))[0] == "a"


async def test_a_request_cancelled_before_it_was_routed_does_not_count() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    asked = [pending(name=str(n)) for n in range(10)]
    for each in asked:
        await choose(by, each, a, b)
        each.future.cancel()
    await asyncio.sleep(0)
    assert (by._load(a.replica_id), by._load(b.replica_id)) == (0, 0)


async def test_a_replica_that_failed_the_request_is_passed_over() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    by.on_request_routed(pending("s"), b.replica_id, None)
    assert await choose(by, pending("s", avoid=("b",)), a, b) == ("a", "resumed")


async def test_under_hard_routing_only_the_holder_is_tried() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b, mode="hard")
    for n in range(9):
        by.on_request_routed(pending("s", name=str(n)), b.replica_id, None)
    ranks = await by.choose_replicas([a, b], pending("s", name="x"))
    assert ranks == [[b]]


async def test_a_call_without_a_request_of_ours_is_routed_too() -> None:
    a = Replica("a")
    call = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata(request_id="r", internal_request_id="i"))
    assert await router(a).choose_replicas([a], call) == [[a]]


def call(*args: Any) -> PendingRequest:
    return PendingRequest(args=list(args), kwargs={}, metadata=RequestMetadata(request_id="r", internal_request_id="i"))


async def test_a_moved_session_is_routed_to_its_new_holder_at_once() -> None:
    a, b, c = Replica("a"), Replica("b"), Replica("c")
    by = router(b, c)
    by.on_request_routed(pending("s"), a.replica_id, None)
    assert await by.choose_replicas([b, c], call(Move(("s", "unknown"), ("a",), "c", 5.0))) == [[c]]
    assert [await choose(by, pending(name), b, c) for name in ("s", "unknown")] == [("c", "holder")] * 2


async def test_a_session_that_went_elsewhere_meanwhile_stays_there() -> None:
    a, b, c = Replica("a"), Replica("b"), Replica("c")
    by = router(a, b, c)
    by.on_request_routed(pending("s"), b.replica_id, None)
    await by.choose_replicas([b, c], call(Move(("s",), ("a",), "c", 5.0)))
    assert await choose(by, pending("s"), b, c) == ("b", "holder")


async def test_a_session_whose_new_holder_was_lost_on_the_way_is_routed_to_the_next() -> None:
    b, c = Replica("b"), Replica("c")
    by = router(b, c)
    for move in (Move(("s",), ("a",), "b", 5.0), Move(("s",), ("a", "b"), "c", 5.0)):
        await by.choose_replicas([b, c], call(move))
    assert await choose(by, pending("s"), b, c) == ("c", "holder")


async def test_a_call_for_one_replica_goes_there_or_to_any_that_will_refuse_it() -> None:
    a, b = Replica("a"), Replica("b")
    by = router(a, b)
    assert await by.choose_replicas([a, b], call(Bound("b"))) == [[b]]
    assert await by.choose_replicas([a, b], call(Bound("gone"))) == [[a, b]]
