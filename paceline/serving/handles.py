"""The gateway's seam to the target replicas, over Serve handles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from paceline.api.gateway import Targets
from paceline.api.state import ClusterStatus, SessionInfo
from paceline.errors import EngineError, Overloaded, PacelineError, Unavailable
from paceline.serving.calls import ask_all, call_alone
from paceline.sessions.handoff import Bound, Move, Outcome
from paceline.sessions.placement import Route
from paceline.types import Frame, Request

logger = logging.getLogger(__name__)

NOTICE_TIMEOUT_S = 2.0


class ServeTargets(Targets):
    """Routes by session, streams frames, asks every replica. No error of Ray's leaves it."""

    def __init__(self, target: DeploymentHandle, draft: DeploymentHandle | None) -> None:
        # Frames go over gRPC between the two processes, half the cost of object references.
        self._generate = target.options(method_name="generate", stream=True, _by_reference=False)
        self._target = target
        self._draft = draft

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        handle = self._generate.options(session_id=request.session_id) if request.session_id else self._generate
        response = handle.remote(request, Route())
        complete = False
        try:
            async for frame in response:
                yield frame
            complete = True
        except (RayError, RayServeException, grpc.aio.AioRpcError) as error:
            complete = True
            raise _translate(error) from error
        finally:
            if not complete:
                response.cancel()

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
        return ClusterStatus(tuple(targets), tuple(drafts))

    async def _drafts(self) -> list[Any]:
        """That none of them is there is no reason to say nothing of the targets."""
        try:
            return await ask_all(self._draft, "status")
        except Unavailable:
            return []


def _translate(error: Exception) -> PacelineError:
    """What a client may know of an error of Ray's."""
    if isinstance(error, BackPressureError):
        return Overloaded("too many requests are waiting; try again shortly", retry_after=1.0)
    # A replica that leaves while it streams ends the call between the processes with a code of gRPC's own.
    if isinstance(error, RayActorError | DeploymentUnavailableError | grpc.aio.AioRpcError):
        return Unavailable("the replica serving this request was lost; send it again")
    logger.error("a target replica failed", exc_info=error)
    return EngineError("internal error")
