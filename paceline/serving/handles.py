"""The gateway's seam to the target replicas, over Serve handles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from paceline.api.gateway import Targets
from paceline.api.state import ClusterStatus, SessionInfo
from paceline.errors import EngineError, Overloaded, PacelineError, Unavailable
from paceline.rpc.frame_feed import FeedReader
from paceline.serving.calls import ask_all, call_alone
from paceline.sessions.handoff import Bound, Move, Outcome
from paceline.sessions.placement import Route
from paceline.types import Accepted, Delta, Frame, Request

logger = logging.getLogger(__name__)

NOTICE_TIMEOUT_S = 2.0
FEED_LAG_S = 5.0
"""How long the feed may be behind the end of a request's own call."""

Arrivals = asyncio.Queue[Frame | Exception]


class ServeTargets(Targets):
    """Routes by session, streams frames, asks every replica. No error of Ray's leaves it."""

    def __init__(
        self,
        target: DeploymentHandle,
        draft: DeploymentHandle | None,
        autoscaling: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> None:
        # Frames that do not come in a feed go over gRPC as well, half the cost of object references.
        self._generate = target.options(method_name="generate", stream=True, _by_reference=False)
        self._target = target
        self._draft = draft
        self._autoscaling = autoscaling
        self._feeds = FeedReader()
        self._watches: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        handle = self._generate.options(session_id=request.session_id) if request.session_id else self._generate
        fed: Arrivals = asyncio.Queue()
        rest: asyncio.Task[None] | None = None
        complete = False
        with self._feeds.listening(request.request_id, fed.put_nowait):
            response = handle.remote(request, Route(), self._feeds.name)
            try:
                async for frame in response:
                    yield frame
                    if isinstance(frame, Accepted) and self._goes_on_in_feed(frame):
                        rest = self._watch(response, fed)
                        break
                left = 0 if rest is None else len(request.choices())
                while left:
                    frame = _frame(await fed.get())
                    yield frame
                    left -= isinstance(frame, Delta) and frame.finished
                complete = True
            except (RayError, RayServeException, grpc.aio.AioRpcError) as error:
                complete = True
                raise _translate(error) from error
            finally:
                if not complete:
                    response.cancel()
                    if rest is not None:
                        rest.cancel()

    def _goes_on_in_feed(self, accepted: Accepted) -> bool:
        """Whether its deltas come in the feed of that replica; if not, those of later requests may."""
        if accepted.feed is not None:
            self._feeds.offer(accepted.feed)
        return accepted.fed

    def _watch(self, response: DeploymentResponseGenerator, fed: Arrivals) -> asyncio.Task[None]:
        """Of a request whose deltas come in the feed: its call ends with it, or says what went wrong."""
        task = asyncio.create_task(_rest(response, fed))
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        return task

    async def close(self) -> None:
        await self._feeds.close()

    async def sessions(self) -> list[SessionInfo]:
        answers = await ask_all(self._target, "sessions")
        return sorted(
            (SessionInfo(*held) for answer in answers for held in answer),
            key=lambda info: (info.session_id, -info.cached_tokens),
        )

    async def close_session(self, session_id: str) -> bool:
        return any(await ask_all(self._target, "close_session", session_id))

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        try:
            outcome: Outcome | None = await call_alone(self._target, "hand_off", Bound(replica), sessions, count, to)
        except (RayError, RayServeException) as error:
            raise _translate(error) from error
        return outcome

    async def abort(self, request_id: str) -> bool:
        return any(await ask_all(self._target, "abort", request_id))

    async def moved(self, moves: Sequence[Move]) -> None:
        """Tell each new holder what is to come. Whoever routes the call notes on the way where follow-ups go."""
        calls = (call_alone(self._target, "expect", move) for move in moves)
        async with asyncio.timeout(NOTICE_TIMEOUT_S):
            await asyncio.gather(*calls, return_exceptions=True)

    async def status(self) -> ClusterStatus:
        targets, drafts = await asyncio.gather(ask_all(self._target, "status"), self._drafts())
        scaled = {} if self._autoscaling is None else await self._autoscaling()
        return ClusterStatus(tuple(targets), tuple(drafts), autoscaling=scaled)

    async def _drafts(self) -> list[Any]:
        """That none of them is there is no reason to say nothing of the targets."""
        try:
            return await ask_all(self._draft, "status")
        except Unavailable:
            return []


async def _rest(response: DeploymentResponseGenerator, fed: Arrivals) -> None:
    """What a request's own call says after its acceptance, into the queue of what the feed says."""
    try:
        async for frame in response:
            fed.put_nowait(frame)
        await asyncio.sleep(FEED_LAG_S)
        fed.put_nowait(Unavailable("the end of the answer was lost; send it again"))
    except Exception as error:
        fed.put_nowait(error)


def _frame(arrived: Frame | Exception) -> Frame:
    if isinstance(arrived, Exception):
        raise arrived
    return arrived


def _translate(error: Exception) -> PacelineError:
    """What a client may know of an error of Ray's."""
    if isinstance(error, BackPressureError):
        return Overloaded("too many requests are waiting; try again shortly", retry_after=1.0)
    # A replica that leaves while it streams ends the call between the processes with a code of gRPC's own.
    if isinstance(error, RayActorError | DeploymentUnavailableError | grpc.aio.AioRpcError):
        return Unavailable("the replica serving this request was lost; send it again")
    logger.error("a target replica failed", exc_info=error)
    return EngineError("internal error")
