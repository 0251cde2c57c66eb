"""Clients of the real service over a real engine that leave, are late or are aborted: nothing of theirs stays."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from typing import Any

import grpc
import pytest

from paceline.rpc.inference_service import InferenceHandlers
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceStub
from tests.api.scripted import gateway
from tests.rpc.engine_target import EngineTarget, engine_target
from tests.rpc.served import OPTIONS, serving

PATIENCE_S = 60.0
ENDLESS = pb.SamplingParams(max_tokens=400, ignore_eos=True, seed=1)


class Held:
    """Holds the engine's thread in the middle of its next step until it is let go; knows of aborts."""

    def __init__(self, replica: EngineTarget, events: asyncio.AbstractEventLoop) -> None:
        self.entered, self.aborted = asyncio.Event(), asyncio.Event()
        self._let_go = threading.Event()
        step, abort = replica.loop.engine.step, replica.loop.abort

        def held() -> Any:
            events.call_soon_threadsafe(self.entered.set)
            assert self._let_go.wait(PATIENCE_S)
            return step()

        def noted(*args: Any) -> Any:
            future = abort(*args)
            self.aborted.set()
            return future

        replica.loop.engine.step = held  # type: ignore[method-assign]
        replica.loop.abort = noted  # type: ignore[method-assign]

    def let_go(self) -> None:
        self._let_go.set()


async def idle(replica: EngineTarget) -> dict[str, Any]:
    """What is left once the engine's thread has done what it was told."""
    engine = replica.loop.engine
    usage = await asyncio.wrap_future(replica.loop.call(engine.kv.usage))
    await asyncio.wrap_future(replica.loop.call(engine.kv.check))
    left = {"in use": usage.in_use, "work": engine.has_work, "sinks": len(replica.loop._sinks)}
    return {**left, "streams": replica.open_streams}


NOTHING = {"in use": 0, "work": False, "sinks": 0, "streams": False}


@pytest.mark.parametrize("way", ["cancelled", "late", "gone"])
async def test_a_call_that_ends_frees_its_kv_after_the_step_it_is_in(way: str) -> None:
    with engine_target() as replica:
        async with serving(InferenceHandlers(gateway(replica))) as address:
            channel = grpc.aio.insecure_channel(address, OPTIONS)
            request = pb.GenerateRequest(text="once upon a time", sampling=ENDLESS)
            call = InferenceStub(channel).Generate(request, timeout=1.0 if way == "late" else None)
            while (await call.read()).WhichOneof("event") != "tokens":
                pass
            held = Held(replica, asyncio.get_running_loop())
            await asyncio.wait_for(held.entered.wait(), PATIENCE_S)
            before = replica.steps
            if way == "cancelled":
                call.cancel()
            elif way == "gone":
                await channel.close(None)
            await asyncio.wait_for(held.aborted.wait(), PATIENCE_S)
            held.let_go()
            assert await idle(replica) == NOTHING
            assert replica.steps - before <= 1
            await channel.close(None)


async def test_an_aborted_request_frees_its_kv_and_its_stream_says_so() -> None:
    with engine_target() as replica:
        async with (
            serving(InferenceHandlers(gateway(replica))) as address,
            grpc.aio.insecure_channel(address, OPTIONS) as channel,
        ):
            stub = InferenceStub(channel)
            sampling = pb.SamplingParams(max_tokens=400, ignore_eos=True, seed=1, n=2)
            call = stub.Generate(pb.GenerateRequest(text="once upon a time", sampling=sampling))
            events = aiter(call)
            started = (await anext(events)).started
            other = stub.Generate(pb.GenerateRequest(text="in a hole", sampling=pb.SamplingParams(max_tokens=40)))
            assert (await stub.Abort(pb.AbortRequest(request_id=started.request_id))).aborted
            ends = [event.finished async for event in events if event.HasField("finished")]
            assert [(end.reason, end.index) for end in ends] == [(pb.FINISH_REASON_ABORT, n) for n in range(2)]
            (end,) = [event.finished async for event in other if event.HasField("finished")]
            assert end.reason == pb.FINISH_REASON_LENGTH
            assert not (await stub.Abort(pb.AbortRequest(request_id=started.request_id))).aborted
            assert await idle(replica) == NOTHING


async def leave(stub: Any, draw: random.Random, seen: Counter[str]) -> None:
    """One client: asks, and goes away at some moment, in some way. `seen` counts what it got before."""
    sampling = pb.SamplingParams(max_tokens=draw.choice([2, 30, 300]), ignore_eos=True, n=draw.choice([1, 1, 3]))
    session = draw.choice(["", "", "a", "b"])
    if draw.random() < 0.5:
        call = stub.Generate(pb.GenerateRequest(text="x" * draw.randint(1, 90), sampling=sampling, session_id=session))
    else:
        messages = [pb.Message(role="user", content="x" * draw.randint(1, 60))]
        limit = draw.choice([None, 0.001, 0.05])
        call = stub.Chat(
            pb.ChatRequest(messages=messages, sampling=sampling, session_id=session, timeout_seconds=limit),
            timeout=draw.choice([None, 0.002, 0.05]),
        )
    try:
        for _ in range(draw.choice([0, 0, 1, 2, 5])):
            event: Any = await call.read()
            if event is grpc.aio.EOF:  # type: ignore[attr-defined]
                seen["end"] += 1
                break
            seen[event.WhichOneof("event")] += 1
            await asyncio.sleep(draw.choice([0, 0, 0.002]))
    except grpc.aio.AioRpcError as error:
        seen[error.code().name] += 1
    call.cancel()


async def disconnect(count: int) -> None:
    """So many of them, up to 24 at once, over connections of which one in a while is closed under them."""
    draw, seen = random.Random(5), Counter[str]()
    with engine_target(max_queued_requests=4) as replica:
        handlers = InferenceHandlers(gateway(replica))
        async with serving(handlers) as address:
            before = len(asyncio.all_tasks())
            for start in range(0, count, 24):
                channel = grpc.aio.insecure_channel(address, OPTIONS)
                stub = InferenceStub(channel)
                clients = [asyncio.create_task(leave(stub, draw, seen)) for _ in range(min(24, count - start))]
                if draw.random() < 0.3:
                    await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
                    for client in clients:
                        client.cancel()
                    await channel.close(None)
                await asyncio.gather(*clients, return_exceptions=True)
                await channel.close(None)
            async with asyncio.timeout(PATIENCE_S):
                while replica.open_streams or len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 (nobody tells)
                    await asyncio.sleep(0.01)
            assert await idle(replica) == NOTHING
            assert handlers._gateway._conversations._busy == set()
            assert seen.keys() >= {"started", "tokens", "finished", "failed", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


async def test_a_thousand_clients_that_leave_at_any_moment_leave_nothing() -> None:
    await disconnect(1000)
