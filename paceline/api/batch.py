"""Several requests that are one to the client, such as a list of prompts: their streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from paceline.api.gateway import Gateway, Prepared
from paceline.api.stream import Stream
from paceline.errors import EngineError, PacelineError, RequestTimeout
from paceline.types import Accepted, Delta

MAX_AT_ONCE = 16
"""Requests of one client's list that run together; the others wait here, not in a replica's queue."""
QUEUED_DELTAS = 64


class Batch:
    """The deltas of several requests as they come, with the index of their choice among all: those of the first request
    come first. All end when one fails, and by the deadline of the first. Use it as a context manager.
    """

    def __init__(self, gateway: Gateway, prepared: Sequence[Prepared], first: Stream) -> None:
        self.accepted: Accepted = first.accepted
        self.deadline: float = first.deadline
        self._gateway = gateway
        self._prepared = prepared
        self._first = first
        self._room = asyncio.Semaphore(MAX_AT_ONCE)
        self._deltas: asyncio.Queue[Delta | PacelineError | None] = asyncio.Queue(QUEUED_DELTAS)
        self._work: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, gateway: Gateway, prepared: Sequence[Prepared]) -> Self:
        """Open the first, so that a refusal of it is known before any status is sent."""
        return cls(gateway, prepared, await gateway.open(prepared[0]))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        found = await self._deltas.get()
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, PacelineError):
            raise found
        return found

    async def __aenter__(self) -> Self:
        self._work = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._work is not None
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)
        await self._first.aclose()

    async def _run(self) -> None:
        end: PacelineError | None = None
        try:
            async with asyncio.timeout_at(self.deadline), asyncio.TaskGroup() as group:
                for number in range(len(self._prepared)):
                    group.create_task(self._forward(number))
        except TimeoutError:
            end = RequestTimeout("the request took longer than it may")
        except BaseExceptionGroup as failed:
            found = failed.exceptions[0]
            end = found if isinstance(found, PacelineError) else EngineError("internal error")
        await self._deltas.put(end)

    async def _forward(self, number: int) -> None:
        prepared = self._prepared[number]
        shift = number * prepared.request.params.n
        async with self._room:
            stream = self._first if number == 0 else await self._gateway.open(prepared)
            async with stream:
                async for delta in stream:
                    await self._deltas.put(replace(delta, index=shift + delta.index))


async def open_all(gateway: Gateway, prepared: Sequence[Prepared]) -> Stream | Batch:
    """One stream of all that was prepared. Raises the first one's error if no replica takes it."""
    return await gateway.open(prepared[0]) if len(prepared) == 1 else await Batch.open(gateway, prepared)
