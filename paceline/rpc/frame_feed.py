"""From a target replica to a router: one stream for the frames of all their requests, a message for each step.

A call between two Serve replicas carries a request, its acceptance and its end; but every frame that it carries costs
the two processes half a millisecond, and a step makes as many frames as sequences run. So a router that has a feed of a
replica gets them there:

    router   generate ────────────────────────────► replica      through Serve: routed, counted, cancelled
             ◄──────────────────── Accepted(fed) ──
             ◄═════ [(request, delta), (request, delta) …] ═════  the feed: what one step made
             ◄═════ [(request, delta), (request, delta) …] ═════
             ◄───────────────────────────── the end ──

The first request from a replica comes without; its acceptance names address and token. Where a feed cannot be had,
every frame comes through Serve. One that breaks fails the requests it carried, and those go on as after any loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from paceline.errors import DraftError, PacelineError
from paceline.rpc.draft_client import CHANNEL_OPTIONS
from paceline.rpc.draft_server import SERVER_OPTIONS
from paceline.rpc.frame_codec import Named, pack, unpack
from paceline.rpc.listen import listening
from paceline.rpc.mailbox import Mailbox
from paceline.types import Delta, Failure, FeedAddress

logger = logging.getLogger(__name__)

SERVICE, METHOD = "paceline.v1.Frames", "Subscribe"
MAX_WAITING_FRAMES = 1 << 17
"""Of one router. At most a step's frames wait, unless it does not read at all."""
FRAMES_IN_MESSAGE = 512
RETRY_S = 5.0
"""Between two attempts to have a feed of a replica."""


class Feed:
    """What one router reads, of one replica."""

    def __init__(self, events: asyncio.AbstractEventLoop) -> None:
        self.frames: Mailbox[Named] = Mailbox(events, MAX_WAITING_FRAMES)
        self.lost: dict[object, Callable[[], None]] = {}

    def end(self) -> None:
        """Nobody reads any more. Idempotent."""
        self.frames.close()
        while self.lost:
            self.lost.popitem()[1]()


class Feeds:
    """A target replica's side: the routers that read here."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self._feeds: dict[str, Feed] = {}

    @property
    def routers(self) -> list[str]:
        """Those that have a feed now."""
        return list(self._feeds)

    @contextlib.contextmanager
    def carrying(self, router: str, lost: Callable[[], None]) -> Iterator[Mailbox[Named] | None]:
        """Where the frames of one request to this router go, None if it has no feed; `lost` is called if that ends."""
        feed, mark = self._feeds.get(router), object()
        if feed is None:
            yield None
            return
        feed.lost[mark] = lost
        try:
            yield feed.frames
        finally:
            feed.lost.pop(mark, None)

    async def subscribe(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        router, _, token = request.decode(errors="replace").partition(" ")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        feed = Feed(asyncio.get_running_loop())
        before, self._feeds[router] = self._feeds.get(router), feed
        if before is not None:
            before.end()
        try:
            yield b""  # it is up
            while frames := await feed.frames.take():
                for start in range(0, len(frames), FRAMES_IN_MESSAGE):
                    yield pack(frames[start : start + FRAMES_IN_MESSAGE])
        except DraftError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        finally:
            if self._feeds.get(router) is feed:
                del self._feeds[router]
            feed.end()


async def start_feed_server(feeds: Feeds, host: str, port: int = 0) -> tuple[grpc.aio.Server, FeedAddress]:
    """Serve on host:port (0: a free one). Raises OSError if the port is taken."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.unary_stream_rpc_method_handler(feeds.subscribe)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    address = listening(server.add_insecure_port, host, port, "target.port")
    await server.start()
    return server, FeedAddress(address, feeds.token)


Listener = Callable[[Delta | Failure], None]


class FeedReader:
    """A router's side: a feed of every replica that offers one, and who listens for which request."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = secrets.token_hex(8)
        self._clock = clock
        self._listeners: dict[str, Listener] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tried: dict[str, float] = {}

    @property
    def subscribed(self) -> list[str]:
        """Addresses of the feeds it has, or is about to have."""
        return list(self._tasks)

    @contextlib.contextmanager
    def listening(self, request_id: str, listener: Listener) -> Iterator[None]:
        """Frames of a request go to `listener`, in order; those of requests without one are dropped."""
        self._listeners[request_id] = listener
        try:
            yield
        finally:
            del self._listeners[request_id]

    def offer(self, feed: FeedAddress) -> None:
        """A replica has a feed: subscribe to it, unless that was done or tried just now."""
        address = feed.address
        if address in self._tasks or self._clock() < self._tried.get(address, 0.0) + RETRY_S:
            return
        self._tried[address] = self._clock()
        task = self._tasks[address] = asyncio.create_task(self._read(feed))
        task.add_done_callback(lambda _: self._tasks.pop(address, None))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, feed: FeedAddress) -> None:
        """Until it ends, however: what it carried is failed by the replica, or was lost with it."""
        try:
            async with grpc.aio.insecure_channel(feed.address, options=CHANNEL_OPTIONS) as channel:
                subscribe: Any = channel.unary_stream(f"/{SERVICE}/{METHOD}", None, None)
                async for message in subscribe(f"{self.name} {feed.token}".encode()):
                    for name, frame in unpack(message) if message else ():
                        if (listener := self._listeners.get(name)) is not None:
                            listener(frame)
        except grpc.aio.AioRpcError as error:
            logger.info("no feed from %s: %s: %s", feed.address, error.code().name, error.details())
        except (PacelineError, ValueError, TypeError):
            logger.exception("the feed from %s failed", feed.address)
        self._tried[feed.address] = self._clock()
        self._forget()

    def _forget(self) -> None:
        """Replicas come and go; their ports are not remembered for ever."""
        due = self._clock() - RETRY_S
        self._tried = {address: at for address, at in self._tried.items() if at >= due}
