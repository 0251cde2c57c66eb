"""A draft replica's gRPC side: streams of several targets, one drafter behind them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from paceline.errors import DraftError, PacelineError
from paceline.rpc import convert
from paceline.rpc.draft_credentials import OPEN, DraftCredentials
from paceline.rpc.listen import listening
from paceline.rpc.mailbox import Mailbox
from paceline.speculation.frames import Candidates, Hello
from paceline.v1 import draft_pb2 as pb
from paceline.v1.draft_pb2_grpc import DraftServicer, add_DraftServicer_to_server

if TYPE_CHECKING:
    from paceline.engine.loop import DrafterLoop

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 16 << 20
"""Of a frame: many times what a target puts into one, and any single history."""
MAX_WAITING_REPLIES = 1024
"""Of one stream. What waits is merged into one message, so that only a target that does not read at all has many."""
SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


class DraftService(DraftServicer):
    """Serves `Draft.Speculate`. Knows its targets by their streams; a stream's end frees what it opened."""

    def __init__(self, loop: DrafterLoop, hello: Hello, credentials: DraftCredentials = OPEN) -> None:
        self.credentials = credentials
        self._loop = loop
        self._hello = hello
        self._names = itertools.count(1)
        self.streams: dict[str, str] = {}

    async def Speculate(
        self, request_iterator: AsyncIterator[pb.DraftRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DraftReply]:
        stream = await self._greet(request_iterator, context)
        replies: Mailbox[list[Candidates]] = Mailbox(asyncio.get_running_loop(), MAX_WAITING_REPLIES)

        def tell(ready: list[Candidates]) -> None:
            if not replies.put(ready):
                raise DraftError(f"{stream}: the target does not read its replies")

        reader: asyncio.Task[None] | None = None
        try:
            yield pb.DraftReply(hello=convert.hello_to_proto(self._hello))
            await asyncio.wrap_future(self._loop.connect(stream, tell))
            reader = asyncio.create_task(self._read(stream, request_iterator, replies))
            while waiting := await replies.take():
                yield convert.candidates_to_proto([candidates for ready in waiting for candidates in ready])
            await reader
        except PacelineError as error:
            await context.abort(grpc.StatusCode[error.grpc_code], error.message)
        finally:
            if reader is not None:
                reader.cancel()
            self.streams.pop(stream, None)
            self._loop.disconnect(stream)

    async def _greet(
        self, requests: AsyncIterator[pb.DraftRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> str:
        """Read the target's hello; end the stream unless it may be here and ids mean the same on both sides. Returns
        its name."""
        if not self.credentials.admits(context.invocation_metadata()):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "this draft wants the token of its deployment; see draft.security"
            )
        try:
            first = await asyncio.wait_for(anext(requests), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello arrived")
        theirs = convert.hello_from_proto(first.hello)
        if theirs.fingerprint != self._hello.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"draft {self._hello.model!r} and target {theirs.model!r} have different tokenizers",
            )
        stream = f"{theirs.replica_id}#{next(self._names)}"
        self.streams[stream] = theirs.replica_id
        return stream

    async def _read(
        self,
        stream: str,
        requests: AsyncIterator[pb.DraftRequest],
        replies: Mailbox[list[Candidates]],
    ) -> None:
        try:
            async for message in requests:
                await asyncio.wrap_future(self._loop.apply(stream, convert.frame_from_proto(message)))
        finally:
            replies.close()


async def start_draft_server(service: DraftService, host: str, port: int = 0) -> tuple[grpc.aio.Server, str]:
    """Serve on host:port (0: a free one). Returns the server and its address. Raises OSError if the port is taken."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_DraftServicer_to_server(service, server)
    address = listening(lambda at: service.credentials.listen(server, at), host, port, "draft.port")
    await server.start()
    return server, address
