"""The requests a target replica is answering."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from paceline.errors import PacelineError
from paceline.types import Delta, Failure, FinishReason, Request


@dataclass(eq=False, slots=True)
class OpenStream:
    """One of them: what is to be sent, which of its outputs have not ended, and whether it is over.

    One that was aborted may still be computed: its outputs ended for the client, not for the engine.
    """

    request: Request
    unfinished: set[int] = field(default_factory=set)
    aborted: bool = False
    frames: asyncio.Queue[Delta | Failure] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Streams:
    """All of them, in the order of their arrival."""

    def __init__(self) -> None:
        self._open: dict[OpenStream, None] = {}

    @contextmanager
    def open(self, request: Request) -> Iterator[OpenStream]:
        stream = OpenStream(request, {each.index for each in request.choices()})
        self._open[stream] = None
        try:
            yield stream
        finally:
            self._close(stream)

    def fail(self, stream: OpenStream, error: PacelineError, replica_id: str) -> None:
        """End one with an error, behind what was said already. From now on it counts as over."""
        stream.frames.put_nowait(Failure.of(error, replica_id))
        self._close(stream)

    def abort(self, request_id: str) -> list[OpenStream]:
        """End a request, behind what was said already, also if it is an attempt to go on elsewhere
        (`paceline.api.resume`). Those that were open."""
        found = [each for each in self._open if each.request.request_id.partition("+")[0] == request_id]
        for stream in found:
            stream.aborted = True
            for index in sorted(stream.unfinished):
                stream.frames.put_nowait(Delta((), "", FinishReason.ABORT, index=index))
        return found

    def __bool__(self) -> bool:
        return bool(self._open)

    def of(self, session_id: str | None) -> list[OpenStream]:
        """Those of a session; of None, those of none."""
        return [stream for stream in self._open if stream.request.session_id == session_id]

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
