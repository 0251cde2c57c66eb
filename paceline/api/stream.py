"""The frames of one request, checked and bounded in time: what both front ends read an answer from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Self

from paceline.api.deadline import Patience
from paceline.errors import EngineError, RequestTimeout, Unavailable
from paceline.types import Accepted, Delta, Failure, Frame

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0


class Stream:
    """An accepted request: who took it (`accepted`), then its deltas by `async for`, until each output finished.

    Iterating raises the `PacelineError` of a Failure frame, `RequestTimeout` at `deadline` (in the event
    loop's time) and `Unavailable` if the frames end before a finished delta. The replica's generator is
    closed, and its work thereby cancelled, however the stream ends; use it as a context manager.
    """

    def __init__(self, pull: _Pull, accepted: Accepted, outputs: int = 1) -> None:
        self.accepted = accepted
        self.deadline = pull.deadline
        self._pull = pull
        self._unfinished = outputs

    @classmethod
    async def open(cls, frames: AsyncIterator[Frame], timeout_s: float, outputs: int = 1) -> Self:
        """Pull the first frame, so that a refusal is known before any status is sent.

        `outputs` is the request's n: so many finished deltas end the stream.
        """
        pull = _Pull(frames, timeout_s)
        try:
            first = await pull.next()
            if not isinstance(first, Accepted):
                raise _out_of_order(first)
        except BaseException:
            await pull.close()
            raise
        return cls(pull, first, outputs)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            if not self._unfinished:
                await self._pull.drain()
                raise StopAsyncIteration
            delta = await self._pull.next()
            if not isinstance(delta, Delta):
                raise _out_of_order(delta)
        except BaseException:
            await self.aclose()
            raise
        self._unfinished -= delta.finished
        return delta

    async def aclose(self) -> None:
        """Stop the work, if it is still going on. May be called again."""
        await self._pull.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Pull:
    """Frames one by one, until the deadline."""

    def __init__(self, frames: AsyncIterator[Frame], timeout_s: float) -> None:
        self.deadline = asyncio.get_running_loop().time() + timeout_s
        self._frames = frames
        self._timeout_s = timeout_s
        self._patience = Patience()

    async def next(self) -> Accepted | Delta:
        """The next frame that is not a failure."""
        try:
            frame = await self._patience.wait(anext(self._frames), self.deadline, self._late)
        except StopAsyncIteration:
            raise Unavailable("the replica ended the answer before it was complete; try again") from None
        if isinstance(frame, Failure):
            raise frame.error()
        return frame

    async def drain(self) -> None:
        """After the finished delta: let the generator end by itself, so that closing it does not look like a cancel."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                logger.error("frame after the finished one: a %s", type(await anext(self._frames)).__name__)
        except (StopAsyncIteration, TimeoutError):
            pass
        except Exception:
            logger.exception("a replica's stream failed after its last frame")

    async def close(self) -> None:
        self._patience.close()
        if not isinstance(self._frames, AsyncGenerator):
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._frames.aclose()
        except Exception:
            logger.exception("closing a replica's stream failed")

    def _late(self) -> RequestTimeout:
        return RequestTimeout(f"the request took longer than {self._timeout_s:g} s")


def _out_of_order(frame: Accepted | Delta) -> EngineError:
    logger.error("frame out of order: %s", type(frame).__name__)  # never its text
    return EngineError("internal error")
