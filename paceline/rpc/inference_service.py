"""The public gRPC service over the gateway.

The handlers fit both Ray Serve's gRPC proxy and any adapter of a plain `grpc.aio` server: an error is put on
the context with `set_code` and `set_details`, then raised as `RpcFailed`, which carries the same public text.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

import grpc

from paceline.api.gateway import Gateway, Prepared
from paceline.errors import InvalidRequest, PacelineError
from paceline.rpc.inference_convert import (
    delta_events,
    input_from,
    messages_from,
    params_from,
    prompt_from,
    session_message,
    speculation_from,
    started_event,
)
from paceline.types import Metrics
from paceline.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

SESSION_ID_KEYS = ("x-session-id", "session_id")
"""Invocation metadata that names the session when the request's field is empty. Ray Serve routes by them."""


Events = AsyncGenerator[pb.GenerateEvent, None]


class RpcContext(Protocol):
    """What the handlers use of a servicer context; Ray Serve's and grpc.aio's both have it."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


class RpcFailed(Exception):
    """Ends a call whose code and details are already on the context. Its text is public."""


class InferenceHandlers:
    """The methods of `paceline.v1.Inference`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Chat(self, request: pb.ChatRequest, grpc_context: RpcContext) -> Events:
        with _reported(grpc_context):
            session_id = _session_id(request.session_id, grpc_context)
            messages, params = messages_from(request.messages), params_from(request.sampling)
            options: dict[str, Any] = {
                "model": request.model,
                "speculate": speculation_from(request),
                "priority": request.priority,
            }
            if request.append:
                prepared = await self._gateway.prepare_turn(_required(session_id), messages, params, **options)
            else:
                prepared = await self._gateway.prepare_chat(messages, params, session_id=session_id, **options)
            async with aclosing(self._events(prepared)) as events:
                async for event in events:
                    yield event

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RpcContext) -> Events:
        with _reported(grpc_context):
            prepared = await self._gateway.prepare_completion(
                prompt_from(request),
                params_from(request.sampling),
                model=request.model,
                session_id=_session_id(request.session_id, grpc_context),
                speculate=speculation_from(request),
                priority=request.priority,
            )
            async with aclosing(self._events(prepared)) as events:
                async for event in events:
                    yield event

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RpcContext) -> pb.TokenizeResponse:
        with _reported(grpc_context):
            token_ids = await self._gateway.tokenize(input_from(request), model=request.model)
            return pb.TokenizeResponse(token_ids=token_ids)

    async def ListModels(
        self,
        request: pb.ListModelsRequest,  # noqa: ARG002
        grpc_context: RpcContext,  # noqa: ARG002
    ) -> pb.ListModelsResponse:
        gateway = self._gateway
        return pb.ListModelsResponse(models=[pb.Model(name=gateway.model_name, max_model_len=gateway.max_model_len)])

    async def CreateSession(self, request: pb.CreateSessionRequest, grpc_context: RpcContext) -> pb.Session:
        with _reported(grpc_context):
            seed = request.seed if request.HasField("seed") else None
            messages = messages_from(request.messages)
            return session_message(await self._gateway.create_session(request.session_id or None, messages, seed))

    async def ForkSession(self, request: pb.ForkSessionRequest, grpc_context: RpcContext) -> pb.Session:
        with _reported(grpc_context):
            return session_message(await self._gateway.fork_session(request.session_id, request.fork_id or None))

    async def ListSessions(
        self,
        request: pb.ListSessionsRequest,  # noqa: ARG002
        grpc_context: RpcContext,
    ) -> pb.ListSessionsResponse:
        with _reported(grpc_context):
            sessions = await self._gateway.sessions()
            return pb.ListSessionsResponse(sessions=[session_message(session) for session in sessions])

    async def GetSession(self, request: pb.GetSessionRequest, grpc_context: RpcContext) -> pb.Session:
        with _reported(grpc_context):
            return session_message(await self._gateway.session(request.session_id))

    async def CloseSession(self, request: pb.CloseSessionRequest, grpc_context: RpcContext) -> pb.CloseSessionResponse:
        with _reported(grpc_context):
            await self._gateway.close_session(request.session_id)
            return pb.CloseSessionResponse()

    async def _events(self, prepared: Prepared) -> Events:
        request = prepared.request
        async with await self._gateway.open(prepared) as stream:
            yield started_event(request, stream.accepted, self._gateway.synthetic_acceptance)
            generated = [0] * request.params.n
            async for delta in stream:
                generated[delta.index] += len(delta.token_ids)
                counted = Metrics(prompt_tokens=len(request.token_ids), completion_tokens=generated[delta.index])
                for event in delta_events(delta, counted):
                    yield event


@contextmanager
def _reported(grpc_context: RpcContext) -> Iterator[None]:
    """Put an error's code and public text on the context. Nothing of an unexpected one gets out but to the log."""
    try:
        yield
    except PacelineError as error:
        code, details = grpc.StatusCode[error.grpc_code], error.message
    except Exception:
        logger.exception("unexpected error in a gRPC call")
        code, details = grpc.StatusCode.INTERNAL, "internal error"
    else:
        return
    grpc_context.set_code(code)
    grpc_context.set_details(details)
    raise RpcFailed(details) from None


def _required(session_id: str | None) -> str:
    if session_id is None:
        raise InvalidRequest("session_id: append needs the session to append to", param="session_id")
    return session_id


def _session_id(field: str, grpc_context: RpcContext) -> str | None:
    if field:
        return field
    metadata = dict(grpc_context.invocation_metadata() or ())
    for key in SESSION_ID_KEYS:
        value = metadata.get(key)
        if isinstance(value, str) and value:
            return value
    return None
