"""The gateway's seam to the target replicas: frames through Serve's own call, and those that come in a feed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Self

import pytest
from ray.exceptions import ActorDiedError

from paceline.errors import Unavailable
from paceline.rpc.frame_feed import FeedReader
from paceline.serving import handles
from paceline.serving.handles import ServeTargets
from paceline.types import Accepted, Delta, Failure, FeedAddress, FinishReason, Frame, Request, SamplingParams

REQUEST = Request("r", (1, 2), SamplingParams(seed=1))
FEED = FeedAddress("127.0.0.1:1", "token")
FED = Accepted("target-1", 1, 2, feed=FEED, fed=True)
MIDDLE, LAST = Delta((5,), "a"), Delta((6,), "b", FinishReason.STOP)
Step = Frame | Exception | Callable[[], Any]


class Response:
    """What Serve gives for a call: the scripted frames; a function in the script is called, or awaited."""

    def __init__(self, script: list[Step]) -> None:
        self._frames = self._run(script)
        self.cancelled = False

    async def _run(self, script: list[Step]) -> AsyncIterator[Frame]:
        for step in script:
            if isinstance(step, Exception):
                raise step
            if callable(step):
                if asyncio.iscoroutine(waited := step()):
                    await waited
            else:
                yield step

    def __aiter__(self) -> AsyncIterator[Frame]:
        return self._frames

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose only call is answered by a script."""

    def __init__(self) -> None:
        self.response = Response([])

    def options(self, **_: Any) -> Self:
        return self

    def remote(self, *_: Any) -> Response:
        return self.response


class House:
    """Targets over a scripted call, and the feed that is said to exist."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.targets = ServeTargets(self.handle, None)  # type: ignore[arg-type]
        self.feeds: FeedReader = self.targets._feeds
        self.offered: list[FeedAddress] = []
        self.feeds.offer = self.offered.append  # type: ignore[method-assign]

    def say(self, *script: Step) -> None:
        self.handle.response = Response(list(script))

    def feed(self, *frames: Delta | Failure) -> Callable[[], None]:
        """A step of the script in which these arrive in the feed."""

        def arrive() -> None:
            for frame in frames:
                self.feeds._listeners["r"](frame)

        return arrive

    async def hear(self) -> list[Frame]:
        async with asyncio.timeout(20):
            return [frame async for frame in self.targets.generate(REQUEST)]


async def test_without_a_feed_frames_come_with_the_call() -> None:
    house = House()
    house.say(Accepted("target-1", 1, 2), MIDDLE, LAST)
    assert await house.hear() == [Accepted("target-1", 1, 2), MIDDLE, LAST]


async def test_a_feed_that_is_there_is_offered_for_later_requests() -> None:
    house = House()
    house.say(Accepted("target-1", 1, 2, feed=FEED), LAST)
    assert await house.hear() == [Accepted("target-1", 1, 2, feed=FEED), LAST]
    assert house.offered == [FEED]


async def test_frames_in_the_feed_come_after_the_acceptance_even_if_they_were_earlier() -> None:
    house = House()
    house.say(house.feed(MIDDLE), FED, house.feed(LAST))
    assert await house.hear() == [FED, MIDDLE, LAST]


async def test_the_call_may_end_before_the_feed_has_said_all() -> None:
    house = House()
    house.say(FED)
    frames = house.targets.generate(REQUEST)
    assert await anext(frames) == FED
    waiting = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0.01)
    house.feed(LAST)()
    assert await waiting == LAST


async def test_a_replica_that_dies_ends_what_it_fed() -> None:
    house = House()
    house.say(FED, house.feed(MIDDLE), ActorDiedError())
    with pytest.raises(Unavailable, match="lost"):
        await house.hear()


async def test_a_failure_that_the_call_says_is_passed_on() -> None:
    house, failure = House(), Failure.of(Unavailable("leaving"), "target-1")
    house.say(FED, failure)
    async with aclosing(house.targets.generate(REQUEST)) as frames:  # type: ignore[type-var]
        assert [await anext(frames), await anext(frames)] == [FED, failure]


async def test_an_end_that_never_comes_in_the_feed_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "FEED_LAG_S", 0.01)
    house = House()
    house.say(FED, house.feed(MIDDLE))
    with pytest.raises(Unavailable, match="the end of the answer was lost"):
        await house.hear()


async def test_who_stops_listening_cancels_the_call() -> None:
    house = House()
    house.say(FED, house.feed(MIDDLE), asyncio.Event().wait)
    async with aclosing(house.targets.generate(REQUEST)) as frames:  # type: ignore[type-var]
        assert [await anext(frames), await anext(frames)] == [FED, MIDDLE]
    assert house.handle.response.cancelled


async def test_an_answer_that_is_complete_is_not_cancelled() -> None:
    house = House()
    house.say(FED, house.feed(LAST))
    await house.hear()
    assert not house.handle.response.cancelled


async def test_nobody_listens_once_it_is_over() -> None:
    house = House()
    house.say(FED, house.feed(LAST))
    await house.hear()
    assert house.feeds._listeners == {}
