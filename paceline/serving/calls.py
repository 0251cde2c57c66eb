"""Calls of replicas by replicas."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from paceline.errors import Unavailable

BROADCAST_TIMEOUT_S = 5.0


def call_alone(handle: DeploymentHandle, method: str, *args: Any) -> DeploymentResponse:
    """A call that may be one of several at once within a request.

    Serve gives all calls within a request the id of that request, and its router loses one of two with the same id.
    """
    return contextvars.Context().run(handle.options(method_name=method).remote, *args)


async def ask_all(handle: DeploymentHandle | None, method: str, *args: Any) -> list[Any]:
    """The answers of every replica that gave one; one that dies or hangs meanwhile is left out.

    Raises Unavailable if there is no replica.
    """
    if handle is None:
        return []
    deadline = asyncio.get_running_loop().time() + BROADCAST_TIMEOUT_S
    try:
        async with asyncio.timeout_at(deadline):
            # `results_async` has one deadline for all: a replica that hangs would take the others' answers along.
            replicas = await handle.broadcast(method, *args)._fetch_replica_results_async()
    except (RayError, RayServeException, TimeoutError) as error:
        raise Unavailable("the replicas did not answer; try again shortly") from error
    answers = await asyncio.gather(*(_answer(replica, deadline) for replica in replicas), return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _answer(replica: Any, deadline: float) -> Any:
    async with asyncio.timeout_at(deadline):
        return await replica.get_async()
