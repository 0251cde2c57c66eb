"""The feed from a replica to a router, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from paceline.rpc.frame_codec import Named
from paceline.rpc.frame_feed import METHOD, SERVICE, FeedReader, Feeds, start_feed_server
from paceline.rpc.mailbox import Mailbox
from paceline.types import Delta, Failure, FeedAddress
from tests.rpc.replicas import until


@asynccontextmanager
async def serving(feeds: Feeds) -> AsyncIterator[FeedAddress]:
    server, address = await start_feed_server(feeds, "127.0.0.1")
    try:
        yield address
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def reading(feeds: Feeds, address: FeedAddress) -> AsyncIterator[FeedReader]:
    """A router that has its feed."""
    reader = FeedReader()
    reader.offer(address)
    await until(lambda: reader.name in feeds.routers)
    try:
        yield reader
    finally:
        await reader.close()


def put(box: Mailbox[Named] | None, *frames: Named) -> None:
    assert box is not None
    for frame in frames:
        box.put(frame)


async def test_each_request_gets_its_own_frames_in_order() -> None:
    feeds, heard = Feeds(), asyncio.Queue[tuple[str, Delta | Failure]]()
    async with serving(feeds) as address, reading(feeds, address) as router:
        with (
            router.listening("a", lambda frame: heard.put_nowait(("a", frame))),
            router.listening("b", lambda frame: heard.put_nowait(("b", frame))),
            feeds.carrying(router.name, lambda: None) as box,
        ):
            frames = [("a", Delta((1,), "x")), ("b", Delta((2,), "y")), ("a", Delta((3,), "z"))]
            put(box, *frames)
            assert [await asyncio.wait_for(heard.get(), 10) for _ in frames] == frames


async def test_frames_nobody_listens_for_are_dropped() -> None:
    feeds, heard = Feeds(), asyncio.Queue[Delta | Failure]()
    async with serving(feeds) as address, reading(feeds, address) as router:
        with router.listening("b", heard.put_nowait), feeds.carrying(router.name, lambda: None) as box:
            put(box, ("a", Delta((1,), "x")), ("b", Delta((2,), "y")))
            assert await asyncio.wait_for(heard.get(), 10) == Delta((2,), "y")


async def test_a_router_without_a_feed_is_carried_by_none() -> None:
    with Feeds().carrying("nobody", lambda: None) as box:
        assert box is None


async def test_a_wrong_token_gets_no_feed() -> None:
    feeds = Feeds()
    async with serving(feeds) as address, grpc.aio.insecure_channel(address.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in channel.unary_stream(f"/{SERVICE}/{METHOD}", None, None)(b"router wrong"):
                pass
        assert (refused.value.code(), feeds.routers) == (grpc.StatusCode.UNAUTHENTICATED, [])


async def test_a_router_that_goes_away_is_a_loss_to_its_requests() -> None:
    feeds, lost = Feeds(), asyncio.Event()
    async with serving(feeds) as address:
        async with reading(feeds, address) as router:
            name = router.name
            with feeds.carrying(name, lost.set):
                await router.close()
                await asyncio.wait_for(lost.wait(), 10)
        assert feeds.routers == []


async def test_a_second_feed_takes_the_place_of_the_first() -> None:
    feeds, lost = Feeds(), asyncio.Event()
    async with serving(feeds) as address, reading(feeds, address) as router:
        with feeds.carrying(router.name, lost.set):
            twin = FeedReader()
            twin.name = router.name
            twin.offer(address)
            await asyncio.wait_for(lost.wait(), 10)
            assert feeds.routers == [router.name]
            await twin.close()


async def test_an_address_nobody_answers_at_is_not_tried_at_once_again() -> None:
    now, feeds = 100.0, Feeds()
    async with serving(feeds) as address:
        pass
    router = FeedReader(clock=lambda: now)
    router.offer(address)
    await until(lambda: not router.subscribed)
    router.offer(address)
    assert router.subscribed == []
    now += 6
    router.offer(address)
    assert router.subscribed == [address.address]
    await router.close()


def test_the_token_is_not_in_what_is_printed() -> None:
    assert "secret" not in repr(FeedAddress("127.0.0.1:1", "secret"))
