"""The requests a target replica is answering."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from paceline.errors import PacelineError
from paceline.rpc.frame_codec import Named
from paceline.rpc.mailbox import Mailbox
from paceline.types import Delta, Failure, Request


@dataclass(eq=False, slots=True)
class OpenStream:
    """One of them: what is to be sent, and whether it is over.

    `frames` ends with None. `left` counts the outputs that have not ended.
    """

    request: Request
    frames: asyncio.Queue[Delta | Failure | None] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0

    def sink(self, feed: Mailbox[Named] | None) -> Callable[[Delta | Failure], None]:
        """What takes this request's frames in the engine's thread: for its own stream, or for the feed that carries
        them, which leaves its own stream nothing but the end."""
        events, name = asyncio.get_running_loop(), self.request.request_id
        self.left = len(self.request.choices())

        def tell(frame: Delta | Failure) -> None:
            if feed is None:
                events.call_soon_threadsafe(self.frames.put_nowait, frame)
            else:
                feed.put((name, frame))
            self.left -= isinstance(frame, Delta) and frame.finished
            if not self.left or isinstance(frame, Failure):
                events.call_soon_threadsafe(self.frames.put_nowait, None)

        return tell


class Streams:
    """All of them, in the order of their arrival."""

    def __init__(self) -> None:
        self._open: dict[OpenStream, None] = {}

    @contextmanager
    def open(self, request: Request) -> Iterator[OpenStream]:
        stream = OpenStream(request)
        self._open[stream] = None
        try:
            yield stream
        finally:
            self._close(stream)

    def fail(self, stream: OpenStream, error: PacelineError, replica_id: str) -> None:
        """End one with an error, behind what was said already. From now on it counts as over."""
        stream.frames.put_nowait(Failure.of(error, replica_id))
        self._close(stream)

    def __bool__(self) -> bool:
        return bool(self._open)

    def of(self, session_id: str | None) -> list[OpenStream]:
        """Those of a session; of None, those of none."""
        return [stream for stream in self._open if stream.request.session_id == session_id]

    def named(self, request_id: str) -> list[OpenStream]:
        """Those of a request: it, or its attempt to go on here (`paceline.api.resume`)."""
        return [stream for stream in self._open if stream.request.request_id.partition("+")[0] == request_id]

    def sessions(self) -> dict[str, int]:
        """Sessions that are being answered, with the tokens of their prompts; the latest first."""
        found = {each.request.session_id: len(each.request.token_ids) for each in reversed(self._open)}
        return {session: tokens for session, tokens in found.items() if session is not None}

    async def over(self, session_id: str | None) -> None:
        """Wait until none of a session is open."""
        while open_ones := self.of(session_id):
            await open_ones[0].ended.wait()

    def _close(self, stream: OpenStream) -> None:
        self._open.pop(stream, None)
        stream.ended.set()
