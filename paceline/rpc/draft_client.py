"""A target replica's side of the draft streams: one connection per drafter, all feeding one proposer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from paceline.errors import DraftError
from paceline.rpc import convert
from paceline.rpc.draft_credentials import OPEN, DraftCredentials
from paceline.rpc.mailbox import Mailbox
from paceline.speculation.frames import DraftFrame, Hello
from paceline.speculation.links import DraftLink
from paceline.speculation.remote import RemoteProposer
from paceline.v1 import draft_pb2 as pb
from paceline.v1.draft_pb2_grpc import DraftStub

logger = logging.getLogger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing from the stubs
CONNECT_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 10.0
"""A drafter whose flow control holds a frame back for so long has stopped reading."""
FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 10.0
MAX_MESSAGE_BYTES = 16 << 20
MAX_WAITING_FRAMES = 256
"""Of one link. An engine makes one a step, and stops long before, when answers stay away."""
MESSAGE_OVERHEAD_BYTES = 5
"""gRPC's prefix of every message."""
CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


class GrpcDraftLink(DraftLink):
    """Frames from the engine's thread, queued for a stream that the event loop writes."""

    def __init__(self, replica_id: str, events: asyncio.AbstractEventLoop) -> None:
        self.replica_id = replica_id
        self.outbox: Mailbox[DraftFrame] = Mailbox(events, MAX_WAITING_FRAMES)

    def send(self, frame: DraftFrame) -> None:
        self.outbox.put(frame)


class DraftPool:
    """Keeps a stream open to every drafter it is told of, and reconnects with backoff while they stay members.

    Lives in one event loop. A drafter that left the membership gets no new sequences; its stream stays
    until the drafter ends it, so that a draining one can finish.
    """

    def __init__(self, proposer: RemoteProposer, hello: Hello, credentials: DraftCredentials = OPEN) -> None:
        self._credentials = credentials
        self._proposer = proposer
        self._hello = hello
        self._members: dict[str, str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.problems: dict[str, str] = {}
        """Why a member has no stream now, by replica."""

    @property
    def members(self) -> dict[str, str]:
        """Address by replica."""
        return dict(self._members)

    def set_members(self, members: Mapping[str, str]) -> None:
        """The draft replicas there are now: address by replica id."""
        for replica_id in self._members.keys() - members.keys():
            self._proposer.retire_link(replica_id)
            self.problems.pop(replica_id, None)
        for replica_id in members.keys() - self._members.keys():
            self._proposer.restore_link(replica_id)
        self._members = dict(members)
        for replica_id in members:
            if replica_id not in self._tasks:
                self._start(replica_id)

    async def close(self) -> None:
        """End every stream."""
        self._members = {}
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, replica_id: str) -> None:
        task = self._tasks[replica_id] = asyncio.create_task(self._keep_connected(replica_id))
        task.add_done_callback(functools.partial(self._ended, replica_id))

    def _ended(self, replica_id: str, _task: asyncio.Task[None]) -> None:
        del self._tasks[replica_id]
        if replica_id in self._members:  # it came back in the meantime
            self._start(replica_id)

    async def _keep_connected(self, replica_id: str) -> None:
        retry_s = FIRST_RETRY_S
        while (address := self._members.get(replica_id)) is not None:
            if await self._stream(replica_id, address):
                retry_s = FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(LONGEST_RETRY_S, retry_s * 2)

    def _note_problem(self, replica_id: str, problem: str) -> None:
        if replica_id in self._members and self.problems.get(replica_id) != problem:
            self.problems[replica_id] = problem
            logger.warning("drafter %s: no stream: %s", replica_id, problem)

    async def _stream(self, replica_id: str, address: str) -> bool:
        """One stream's whole life. Whether it was ever up; why it ended is noted."""
        up = False
        try:
            async with self._credentials.channel(address, CHANNEL_OPTIONS) as channel:
                call = DraftStub(channel).Speculate(metadata=self._credentials.metadata())
                try:
                    await self._greet(call)
                    up = True
                    await self._serve(replica_id, call)
                finally:
                    call.cancel()
        except DraftError as error:
            self._note_problem(replica_id, error.message)
        except grpc.aio.AioRpcError as error:
            self._note_problem(replica_id, f"{error.code().name}: {error.details()}")
        except Exception:
            logger.exception("drafter %s: the stream failed", replica_id)
            self._note_problem(replica_id, "the stream failed; the log has the reason")
        return up

    async def _greet(self, call: Any) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                with _as_written():
                    await call.write(pb.DraftRequest(hello=convert.hello_to_proto(self._hello)))
                reply = await call.read()
        except TimeoutError:
            raise DraftError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        if reply is EOF:
            raise DraftError("the stream ended before it began")
        theirs = convert.hello_from_proto(reply.hello)
        if theirs.fingerprint != self._hello.fingerprint:
            raise DraftError(f"draft {theirs.model!r} has another tokenizer than target {self._hello.model!r}")

    async def _serve(self, replica_id: str, call: Any) -> None:
        link = GrpcDraftLink(replica_id, asyncio.get_running_loop())
        reader = asyncio.create_task(self._read(link, call))
        writer = asyncio.create_task(_write(call, link))
        self.problems.pop(replica_id, None)
        self._proposer.add_link(link)
        if replica_id not in self._members:
            self._proposer.retire_link(replica_id)
        logger.info("drafter %s: stream up", replica_id)
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()  # raises why
            await reader
        finally:
            self._proposer.remove_link(link)
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            logger.info("drafter %s: stream down", replica_id)

    async def _read(self, link: GrpcDraftLink, call: Any) -> None:
        while (reply := await call.read()) is not EOF:
            link.bytes_received += reply.ByteSize() + MESSAGE_OVERHEAD_BYTES
            self._proposer.receive(link, convert.candidates_from_proto(reply))


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """A drafter that refuses before it has the first frame breaks the write, and gRPC then knows no more than that: the
    next try is told why."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INTERNAL:
            raise
        raise DraftError("the stream was refused before it began") from None


@contextlib.contextmanager
def _as_draft_error() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise DraftError(f"no frame was taken for {WRITE_TIMEOUT_S:g} s") from None


async def _write(call: Any, link: GrpcDraftLink) -> None:
    """A broken stream ends the read side too, which reports it. Raises DraftError if the drafter does not keep up."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError), _as_draft_error():
        while True:
            for frame in await link.outbox.take():
                message = convert.frame_to_proto(frame)
                link.bytes_sent += message.ByteSize() + MESSAGE_OVERHEAD_BYTES
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await call.write(message)
