"""A bounded queue from any thread into an event loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from paceline.errors import DraftError
from paceline.rpc.mailbox import Mailbox


def mailbox(limit: int = 3) -> Mailbox[int]:
    return Mailbox(asyncio.get_running_loop(), limit)


async def test_everything_waiting_is_taken_at_once() -> None:
    made = mailbox()
    made.put(1)
    made.put(2)
    assert await made.take() == [1, 2]


async def test_an_item_from_another_thread_wakes_the_reader() -> None:
    made = mailbox()
    waiting = asyncio.create_task(made.take())
    await asyncio.sleep(0)
    threading.Thread(target=made.put, args=(1,)).start()
    assert await waiting == [1]


async def test_one_too_many_ends_it() -> None:
    made = mailbox(limit=2)
    assert [made.put(n) for n in range(4)] == [True, True, False, False]


async def test_what_overflowed_says_so() -> None:
    made = mailbox(limit=0)
    made.put(1)
    with pytest.raises(DraftError, match="does not keep up"):
        await made.take()


async def test_a_closed_one_gives_what_it_has_and_then_nothing() -> None:
    made = mailbox()
    made.put(1)
    made.close()
    assert [await made.take(), await made.take()] == [[1], []]


async def test_a_closed_one_takes_everything_and_keeps_nothing() -> None:
    made = mailbox(limit=1)
    made.close()
    assert [made.put(1), made.put(2), await made.take()] == [True, True, []]
