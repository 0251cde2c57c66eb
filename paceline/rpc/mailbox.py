"""From any thread to one event loop, bounded: who reads too slowly loses the stream, not the memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from typing import Generic, TypeVar

from paceline.errors import DraftError

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue of at most `limit` items. One more ends it for good: what was lost cannot be made up for."""

    def __init__(self, events: asyncio.AbstractEventLoop, limit: int) -> None:
        self._events, self._limit = events, limit
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._wake = asyncio.Event()
        self._signalled = False
        self._ended: str | None = None

    def put(self, item: T) -> bool:
        """From any thread. False if it overflowed, now or before; one that was closed takes everything and keeps
        nothing."""
        with self._lock:
            if self._ended is None and len(self._items) >= self._limit:
                self._ended = f"the other side does not keep up: {self._limit} messages wait for it"
                self._items.clear()
            if self._ended is None:
                self._items.append(item)
            overflowed = bool(self._ended)
            asleep, self._signalled = not self._signalled, True
        if asleep:  # a wake-up is a system call, and several items may come before the reader is there
            self._signal()
        return not overflowed

    def close(self) -> None:
        """Nothing more comes: `take` returns what is there, then nothing."""
        with self._lock:
            self._ended = "" if self._ended is None else self._ended
        self._signal()

    async def take(self) -> list[T]:
        """Everything there is, at least one item; none once it is closed. Raises DraftError if it overflowed."""
        while True:
            with self._lock:
                self._wake.clear()
                self._signalled = False
                items = list(self._items)
                self._items.clear()
                ended = self._ended
            if items:
                return items
            if ended:
                raise DraftError(ended)
            if ended is not None:
                return []
            await self._wake.wait()

    def _signal(self) -> None:
        # The loop is closed only while the process ends; a message is worth nothing then.
        with contextlib.suppress(RuntimeError):
            self._events.call_soon_threadsafe(self._wake.set)
