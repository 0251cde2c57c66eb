"""A wait that ends: with what was awaited, or with an error a client can read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from paceline.errors import PacelineError

T = TypeVar("T")


async def bounded(answer: Awaitable[T], scope: asyncio.Timeout, late: PacelineError) -> T:
    """What `answer` gives within `scope`, else `late` is raised. A timeout of the answer's own stays what it is."""
    try:
        async with scope:
            return await answer
    except TimeoutError:
        if not scope.expired():
            raise
        raise late from None


class Patience:
    """Bounds many short waits of one task, one after the other, with one timer.

    A stream waits twice for each frame, and `asyncio.timeout` makes and cancels a timer for each: a tenth of what a
    frame costs. Here a wait notes when it is due; the timer looks at that once it fires, mostly to set itself again.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._task: asyncio.Task[object] | None = None
        self._cut = False

    async def wait(self, answer: Awaitable[T], due: float, late: Callable[[], Exception]) -> T:
        """What `answer` gives until `due`, in the event loop's time; then it is cancelled and `late()` raised."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._due, self._task = due, task
        if self._timer is None or due < self._timer.when():
            self._set(due)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._cut and task.uncancel() <= cancelling:
                raise late() from None
            raise
        finally:
            self._due, self._task, self._cut = None, None, False

    def close(self) -> None:
        """After the last wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, due: float) -> None:
        self.close()
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._due is None or self._task is None:
            return  # the next wait sets it
        if self._due > self._loop.time():
            self._set(self._due)
            return
        self._cut = True
        self._task.cancel()
