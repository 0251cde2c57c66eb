"""What replicas give each other when one leaves, without a cluster."""

from __future__ import annotations

import asyncio
import time

import pytest

from paceline.serving import handoff
from paceline.sessions.handoff import Move
from paceline.types import Failure, Request, SamplingParams
from tests.serving.exchanges import GEOMETRY, World


def request(session: str | None, name: str = "r") -> Request:
    return Request(name, (1, 2, 3), SamplingParams(), session)


async def test_all_sessions_of_a_leaving_replica_are_at_its_peers_and_routed_there() -> None:
    world = World("a", "b", "c")
    for n in range(6):
        world["a"].hold(f"s{n}", 20)
    await world["a"].leave()
    assert {name: len(world[name].kv.sessions()) for name in "bc"} == {"b": 3, "c": 3}
    assert all(session in world[holder].kv.sessions() for session, holder in world.routed.items())
    assert world["a"].stopped


async def test_the_latest_used_session_goes_first() -> None:
    world = World("a", "b")
    for name in ("old", "new"):
        world["a"].hold(name, 20)
    await world["a"].leave()
    assert world.sent == [("b", ["new", "old"])]


async def test_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "BATCH_BYTES", 10 * GEOMETRY.bytes_per_token)
    world = World("a", "b")
    world["a"].hold("long", 35)
    await world["a"].leave()
    assert world.sent == [("b", ["long"])] * 4
    assert world["b"].kv.sessions() == {"long": (35, False)}


async def test_what_a_dead_peer_was_to_take_goes_to_the_others() -> None:
    world = World("a", "b", "c")
    world.dead = {"b"}
    for n in range(6):
        world["a"].hold(f"s{n}", 20)
    await world["a"].leave()
    assert len(world["c"].kv.sessions()) == 6
    assert set(world.routed.values()) == {"c"}


async def test_a_replica_whose_peers_are_all_dead_ends_all_the_same() -> None:
    world = World("a", "b")
    world.dead = {"b"}
    world["a"].hold("s", 20)
    await world["a"].leave()
    assert world["a"].stopped


async def test_a_session_being_answered_goes_when_the_answer_is_over() -> None:
    world = World("a", "b")
    with world["a"].exchange.streams.open(request("busy")):
        world["a"].on_change(False)
        await asyncio.sleep(0.01)
        assert (world.routed, world.sent) == ({"busy": "b"}, [])
        world["a"].hold("busy", 30)
    await world["a"].exchange.finish()
    assert world["b"].kv.sessions() == {"busy": (30, False)}


async def test_an_answer_that_takes_too_long_is_cut_off_after_its_kv_is_elsewhere() -> None:
    world = World("a", "b", grace_s=0.01)
    world["a"].hold("busy", 30)
    with world["a"].exchange.streams.open(request("busy")) as stream:
        world["a"].on_change(False)
        frame = await asyncio.wait_for(stream.frames.get(), 5)
        assert world["b"].kv.sessions() == {"busy": (30, False)}
    assert isinstance(frame, Failure)
    assert (frame.code, frame.replica_id, world["a"].loop.aborted) == ("service_unavailable", "a", ["r"])


async def test_an_answer_of_no_session_is_cut_off_as_well() -> None:
    world = World("a", "b", grace_s=0.01)
    with world["a"].exchange.streams.open(request(None)) as stream:
        world["a"].on_change(False)
        assert isinstance(await asyncio.wait_for(stream.frames.get(), 5), Failure)
        await world["a"].exchange.finish()
    assert world.sent == []


async def test_a_session_whose_request_was_on_its_way_when_the_replica_left_goes_too() -> None:
    world = World("a", "b")
    world["a"].hold("late", 20)
    with world["a"].exchange.streams.open(request(None)):
        world["a"].on_change(False)
        await asyncio.sleep(0.01)
        with world["a"].exchange.streams.open(request("late", "r2")):
            world["a"].hold("late", 30)
    await world["a"].exchange.finish()
    assert world["b"].kv.sessions() == {"late": (30, False)}


async def test_a_leaving_replica_takes_nothing() -> None:
    world = World("a", "b")
    world["b"].on_change(False)
    world["a"].hold("s", 20)
    await world["a"].leave()
    assert (world.routed, world.sent) == ({}, [])


async def test_a_replica_that_stays_after_all_can_take_again() -> None:
    world = World("a", "b")
    world["b"].on_change(False)
    world["b"].on_change(True)
    assert await world["b"].exchange.room() is not None


async def test_with_no_deadline_nothing_is_handed_over() -> None:
    world = World("a", "b", within_s=0)
    world["a"].hold("s", 20)
    await world["a"].leave()
    assert world.sent == []


async def test_a_follow_up_waits_for_kv_that_is_on_its_way() -> None:
    world = World("a", "b")
    world["a"].hold("s", 20)
    with world["a"].exchange.streams.open(request("s")):
        world["a"].on_change(False)
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(world["b"].exchange.arrival("s"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 5)
    assert world["b"].kv.sessions() == {"s": (20, False)}


async def test_a_request_for_nothing_announced_does_not_wait() -> None:
    began = time.monotonic()
    for session in (None, "s"):
        await World("b")["b"].exchange.arrival(session)
    assert time.monotonic() - began < handoff.ARRIVAL_WAIT_S / 2


async def test_a_session_somebody_waits_for_overtakes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "BATCH_BYTES", 20 * GEOMETRY.bytes_per_token)
    world = World("a", "b")
    for name in ("wanted", "second", "first"):
        world["a"].hold(name, 20)
    world["b"].exchange.expect(_move("wanted"))
    waiting = asyncio.create_task(world["b"].exchange.arrival("wanted"))
    await asyncio.sleep(0)
    await world["a"].leave()
    await waiting
    assert [sessions for _, sessions in world.sent] == [["first"], ["wanted"], ["second"]]


async def test_what_was_announced_and_does_not_come_is_counted_and_waited_for_no_longer() -> None:
    world = World("b")
    world["b"].exchange.expect(_move("s", within_s=0.01))
    await asyncio.wait_for(world["b"].exchange.arrival("s"), 5)
    assert world["b"].exchange.numbers()["missing"] == 1


async def test_on_demand_a_session_moves_and_is_forgotten_here() -> None:
    world = World("a", "b", "c")
    for n in range(3):
        world["a"].hold(f"s{n}", 20)
    outcome = await world["a"].exchange.give(["s1"], 1, "c")
    assert (outcome.arrived, world.routed) == ({"s1": "c"}, {"s1": "c"})
    assert (list(world["a"].kv.sessions()), list(world["c"].kv.sessions())) == (["s0", "s2"], ["s1"])


async def test_a_hot_replica_gives_those_used_last_that_are_idle() -> None:
    world = World("a", "b")
    for n in range(4):
        world["a"].hold(f"s{n}", 20)
    with world["a"].exchange.streams.open(request("s3")):
        outcome = await world["a"].exchange.give(None, 2, None)
    assert list(outcome.arrived) == ["s2", "s1"]


async def test_on_demand_what_cannot_move_says_why() -> None:
    world = World("a", "b")
    world["a"].hold("busy", 20)
    with world["a"].exchange.streams.open(request("busy")):
        outcome = await world["a"].exchange.give(["busy", "unknown"], 2, None)
    assert outcome.left == {"busy": "being answered", "unknown": "without KV"}


async def test_both_sides_count() -> None:
    world = World("a", "b")
    world["a"].hold("s", 20)
    await world["a"].leave()
    sent, received = world["a"].exchange.numbers(), world["b"].exchange.numbers()
    size = 20 * GEOMETRY.bytes_per_token
    assert (sent["sent"], sent["bytes_sent"]) == (1, size)
    assert (received["received"], received["bytes_received"], received["missing"]) == (1, size, 0)


def _move(session: str, within_s: float = 5.0) -> Move:
    return Move((session,), ("a",), "b", within_s)
