"""Waits that end."""

from __future__ import annotations

import asyncio

import pytest

from paceline.api.deadline import Patience
from paceline.errors import RequestTimeout


def soon(seconds: float = 0.01) -> float:
    return asyncio.get_running_loop().time() + seconds


def late() -> RequestTimeout:
    return RequestTimeout("late")


async def test_what_comes_in_time_is_returned() -> None:
    assert await Patience().wait(asyncio.sleep(0, "here"), soon(10), late) == "here"


async def test_what_does_not_come_is_late() -> None:
    with pytest.raises(RequestTimeout):
        await Patience().wait(asyncio.Event().wait(), soon(), late)


async def test_a_later_wait_with_a_sooner_end_ends_sooner() -> None:
    patience = Patience()
    await patience.wait(asyncio.sleep(0), soon(60), late)
    with pytest.raises(RequestTimeout):
        await asyncio.wait_for(patience.wait(asyncio.Event().wait(), soon(), late), 20)


async def test_a_timer_that_fires_for_a_wait_that_is_over_leaves_the_next_alone() -> None:
    patience, due = Patience(), soon(0.01)
    await patience.wait(asyncio.sleep(0), due, late)
    assert await patience.wait(asyncio.sleep(0.05, "here"), soon(20), late) == "here"


async def test_every_wait_of_many_may_be_the_one_that_is_late() -> None:
    patience = Patience()
    for _ in range(3):
        await patience.wait(asyncio.sleep(0.005), soon(5), late)
    with pytest.raises(RequestTimeout):
        await patience.wait(asyncio.Event().wait(), soon(), late)
    assert await patience.wait(asyncio.sleep(0, "again"), soon(5), late) == "again"


async def test_a_cancel_from_outside_stays_one() -> None:
    waiting = asyncio.create_task(Patience().wait(asyncio.Event().wait(), soon(20), late))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_task_that_was_late_is_not_left_cancelled() -> None:
    async def work() -> int:
        with pytest.raises(RequestTimeout):
            await Patience().wait(asyncio.Event().wait(), soon(), late)
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(work()) == 0


async def test_an_error_of_the_answer_s_own_is_its_own() -> None:
    async def broken() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await Patience().wait(broken(), soon(20), late)
