"""The frames of one request: order, failures, deadlines, release."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from paceline.api import Stream
from paceline.api import stream as stream_module
from paceline.errors import EngineError, Overloaded, PacelineError, RequestTimeout, Unavailable
from paceline.types import Delta, Failure, FinishReason, Frame, Request, SamplingParams
from tests.api.scripted import ACCEPTED, HELLO, Hang, ScriptedTargets

REQUEST = Request("r", (1, 2), SamplingParams(seed=1))


def scripted(*script: Frame | Exception | Hang) -> ScriptedTargets:
    return ScriptedTargets(script)


async def opened(targets: ScriptedTargets, timeout_s: float = 30.0) -> Stream:
    return await Stream.open(targets.generate(REQUEST), timeout_s)


async def collect(targets: ScriptedTargets, timeout_s: float = 30.0) -> Sequence[Delta]:
    async with await opened(targets, timeout_s) as stream:
        return [delta async for delta in stream]


async def test_an_accepted_request_gives_its_deltas() -> None:
    targets = scripted(*HELLO)
    assert [delta.text for delta in await collect(targets)] == ["Hel", "lo"]


async def test_a_finished_stream_is_not_cancelled() -> None:
    targets = scripted(*HELLO)
    await collect(targets)
    assert targets.ended == ["complete"]


async def test_a_refusal_is_raised_on_opening() -> None:
    with pytest.raises(Overloaded, match="full") as caught:
        await opened(scripted(Failure.of(Overloaded("full", retry_after=2.0))))
    assert caught.value.retry_after == 2.0


async def test_a_failure_is_raised_in_its_place() -> None:
    targets = scripted(*HELLO[:2], Failure("service_unavailable", "replica died"))
    stream = await opened(targets)
    assert (await anext(stream)).text == "Hel"
    with pytest.raises(Unavailable, match="replica died"):
        await anext(stream)
    assert targets.ended == ["closed"]


@pytest.mark.parametrize("script", [[], [ACCEPTED], HELLO[:2]])
async def test_a_stream_that_ends_early_is_unavailable(script: Sequence[Frame]) -> None:
    with pytest.raises(Unavailable, match="before it was complete"):
        await collect(scripted(*script))


@pytest.mark.parametrize("script", [[HELLO[1]], [ACCEPTED, ACCEPTED]])
async def test_frames_out_of_order_are_an_internal_error(script: Sequence[Frame]) -> None:
    with pytest.raises(EngineError, match=r"^internal error$"):
        await collect(scripted(*script))


@pytest.mark.parametrize("script", [[Hang()], [ACCEPTED, Hang()], [*HELLO[:2], Hang()]])
async def test_the_deadline_ends_the_work(script: Sequence[Frame | Hang]) -> None:
    targets = scripted(*script)
    with pytest.raises(RequestTimeout, match=r"longer than 0\.01 s"):
        await collect(targets, timeout_s=0.01)
    assert targets.ended == ["cancelled"]


async def test_a_timeout_inside_the_replica_is_not_taken_for_the_deadline() -> None:
    with pytest.raises(TimeoutError) as caught:
        await collect(scripted(ACCEPTED, TimeoutError("inner")))
    assert not isinstance(caught.value, PacelineError)


async def test_leaving_early_closes_the_generator() -> None:
    targets = scripted(*HELLO)
    async with await opened(targets) as stream:
        await anext(stream)
    assert targets.ended == ["closed"]


@pytest.mark.parametrize("script", [[Hang()], [ACCEPTED, Hang()]])
async def test_cancelling_the_reader_cancels_the_work(script: Sequence[Frame | Hang]) -> None:
    targets = scripted(*script)
    reader = asyncio.create_task(collect(targets))
    await targets.hanging.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert targets.ended == ["cancelled"]


@pytest.mark.parametrize("after", [Hang(), Delta((1,), "x"), RuntimeError("late")])
async def test_nothing_after_the_finished_delta_matters(
    after: Hang | Delta | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "CLOSE_TIMEOUT_S", 0.01)
    targets = scripted(*HELLO, after)
    assert [delta.finish_reason for delta in await collect(targets)] == [None, FinishReason.STOP]
    assert len(targets.ended) == 1
