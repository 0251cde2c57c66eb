"""The public gRPC service over the gateway.

The handlers fit Ray Serve's gRPC proxy and a plain `grpc.aio` server alike (`paceline.rpc.inference_server`). An error
is put on the context (code, details and trailing metadata), and the call then ends as if nothing had happened: what is
raised reaches a client through Serve's proxy with its code and details alone, and fills the log with tracebacks. Serve
takes the context along with a message, so a stream's last one is then `failed`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol, TypeVar

import grpc

from paceline.api.gateway import DRAIN_TIMEOUT_S, Gateway, Prepared
from paceline.api.middleware import REQUEST_ID_HEADER, checked_request_id
from paceline.errors import EngineError, InvalidRequest, PacelineError
from paceline.rpc.inference_convert import (
    TIMEOUT_KEY,
    drain_timeout_from,
    ids_from,
    in_own_words,
    input_from,
    messages_from,
    params_from,
    prompt_from,
    speculation_from,
    timeout_from,
)
from paceline.rpc.inference_events import failed_event, session_message, started_event, status_message
from paceline.rpc.inference_server import Unreadable
from paceline.rpc.inference_tools import EventWriter, check_calls, says_of_tools, tools_from
from paceline.rpc.rich_errors import DETAILS_KEY, status_of
from paceline.telemetry.requests import Origin
from paceline.telemetry.tracing import TRACEPARENT, checked
from paceline.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

SESSION_ID_KEYS = ("x-session-id", "session_id")
"""Invocation metadata that names the session when the request's field is empty. Ray Serve routes by them."""
REQUEST_ID_KEYS = (REQUEST_ID_HEADER, "request_id")
"""Invocation metadata that names the call, for traces. The second is Ray Serve's."""

Events = AsyncGenerator[pb.GenerateEvent, None]
A = TypeVar("A")


class RpcContext(Protocol):
    """What the handlers use of a servicer context; Ray Serve's and grpc.aio's both have it."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, bytes]]) -> None: ...


Handler = Callable[[Any, Any, RpcContext], Awaitable[A]]


def _answers(empty: type[A]) -> Callable[[Callable[[Any, Any], Awaitable[A]]], Handler[A]]:
    """Makes a method a handler with one answer: `empty` if it fails, which nobody gets to see beside the status."""

    def decorated(method: Callable[[Any, Any], Awaitable[A]]) -> Handler[A]:
        @wraps(method)
        async def handler(self: Any, request: Any, grpc_context: RpcContext) -> A:
            try:
                return await method(self, self.admitted(request))
            except Exception as error:
                _report(error, grpc_context)
                return empty()

        return handler

    return decorated


class InferenceHandlers:
    """The methods of `paceline.v1.Inference`. With a `refusal` each call ends with it."""

    def __init__(self, gateway: Gateway, refusal: PacelineError | None = None) -> None:
        self._gateway = gateway
        self._refusal = refusal

    def admitted(self, request: Any) -> Any:
        """The request, if it may be answered and is one. Raises the refusal, or InvalidRequest."""
        if self._refusal is not None:
            raise self._refusal
        if isinstance(request, Unreadable):
            raise InvalidRequest(request.why)
        return request

    async def Chat(self, request: pb.ChatRequest, grpc_context: RpcContext) -> Events:
        async with aclosing(self._streamed(self._prepare_chat, request, grpc_context)) as events:
            async for event in events:
                yield event

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RpcContext) -> Events:
        async with aclosing(self._streamed(self._prepare_completion, request, grpc_context)) as events:
            async for event in events:
                yield event

    @_answers(pb.AbortResponse)
    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=await self._gateway.abort(_required("request_id", request.request_id)))

    @_answers(pb.TokenizeResponse)
    async def Tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        token_ids = await self._gateway.tokenize(input_from(request), model=request.model)
        return pb.TokenizeResponse(token_ids=token_ids)

    @_answers(pb.DetokenizeResponse)
    async def Detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        token_ids = ids_from("token_ids", request.token_ids)
        return pb.DetokenizeResponse(text=await self._gateway.detokenize(token_ids, model=request.model))

    @_answers(pb.ListModelsResponse)
    async def ListModels(self, _: pb.ListModelsRequest) -> pb.ListModelsResponse:
        gateway = self._gateway
        return pb.ListModelsResponse(models=[pb.Model(name=gateway.model_name, max_model_len=gateway.max_model_len)])

    @_answers(pb.Session)
    async def CreateSession(self, request: pb.CreateSessionRequest) -> pb.Session:
        seed = request.seed if request.HasField("seed") else None
        messages = messages_from(request.messages)
        return session_message(await self._gateway.create_session(request.session_id or None, messages, seed))

    @_answers(pb.Session)
    async def ForkSession(self, request: pb.ForkSessionRequest) -> pb.Session:
        return session_message(await self._gateway.fork_session(request.session_id, request.fork_id or None))

    @_answers(pb.ListSessionsResponse)
    async def ListSessions(self, _: pb.ListSessionsRequest) -> pb.ListSessionsResponse:
        sessions = await self._gateway.sessions()
        return pb.ListSessionsResponse(sessions=[session_message(session) for session in sessions])

    @_answers(pb.Session)
    async def GetSession(self, request: pb.GetSessionRequest) -> pb.Session:
        return session_message(await self._gateway.session(request.session_id))

    @_answers(pb.CloseSessionResponse)
    async def CloseSession(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        await self._gateway.close_session(request.session_id)
        return pb.CloseSessionResponse()

    @_answers(pb.Session)
    async def MoveSession(self, request: pb.MoveSessionRequest) -> pb.Session:
        return session_message(await self._gateway.move_session(request.session_id, request.replica_id or None))

    @_answers(pb.StatusResponse)
    async def Status(self, _: pb.StatusRequest) -> pb.StatusResponse:
        gateway = self._gateway
        return status_message(gateway.model_name, gateway.max_model_len, await gateway.status())

    @_answers(pb.RelieveResponse)
    async def Relieve(self, request: pb.RelieveRequest) -> pb.RelieveResponse:
        if not request.sessions:
            raise InvalidRequest("sessions: must be at least 1", param="sessions")
        outcome = await self._gateway.relieve(request.replica_id, request.sessions)
        return pb.RelieveResponse(moved=outcome.arrived, stay=outcome.left)

    @_answers(pb.DrainResponse)
    async def Drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        timeout_s = drain_timeout_from(request)
        outcome = await self._gateway.drain(request.replica_id, DRAIN_TIMEOUT_S if timeout_s is None else timeout_s)
        return pb.DrainResponse(moved=outcome.arrived, stay=outcome.left)

    async def _streamed(
        self, prepare: Callable[[Any, RpcContext], Awaitable[Prepared]], request: Any, grpc_context: RpcContext
    ) -> Events:
        try:
            prepared = await prepare(self.admitted(request), grpc_context)
            async with aclosing(self._events(prepared)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            yield failed_event(_report(error, grpc_context))

    async def _prepare_chat(self, request: pb.ChatRequest, grpc_context: RpcContext) -> Prepared:
        timeout_s = timeout_from(request, text_metadata(grpc_context).get(TIMEOUT_KEY))
        session_id = request.session_id or _session_id(grpc_context)
        messages, params = messages_from(request.messages), params_from(request.sampling)
        check_calls(messages)
        tools = tools_from(request, params)
        options: dict[str, Any] = {
            "model": request.model,
            "speculate": speculation_from(request),
            "priority": request.priority,
        }
        if request.append:
            session_id = _required("session_id", session_id)
            given = tools if says_of_tools(request) else None
            prepared = await self._gateway.prepare_turn(session_id, messages, params, tools=given, **options)
        else:
            options |= {"session_id": session_id, "tools": tools}
            prepared = await self._gateway.prepare_chat(messages, params, **options)
        return replace(prepared, timeout_s=timeout_s, origin=_origin(grpc_context))

    async def _prepare_completion(self, request: pb.GenerateRequest, grpc_context: RpcContext) -> Prepared:
        timeout_s = timeout_from(request, text_metadata(grpc_context).get(TIMEOUT_KEY))
        prepared = await self._gateway.prepare_completion(
            prompt_from(request),
            params_from(request.sampling),
            model=request.model,
            session_id=request.session_id or _session_id(grpc_context),
            speculate=speculation_from(request),
            priority=request.priority,
        )
        return replace(prepared, timeout_s=timeout_s, origin=_origin(grpc_context))

    async def _events(self, prepared: Prepared) -> Events:
        request = prepared.request
        async with await self._gateway.open(prepared) as stream:
            yield started_event(request, stream.accepted, self._gateway.synthetic_acceptance)
            writer = EventWriter(request, self._gateway.readers(prepared.tools))
            async for delta in stream:
                for event in writer.events(delta):
                    yield event


def _report(error: Exception, grpc_context: RpcContext) -> PacelineError:
    """Put an error on the context and return it as a client may see it: nothing of an unexpected one gets out but to
    the log."""
    if not isinstance(error, PacelineError):
        logger.error("unexpected error in a gRPC call", exc_info=error)
        error = EngineError("internal error")
    error = in_own_words(error)
    code, details, status = status_of(error)
    grpc_context.set_code(code)
    grpc_context.set_details(details)
    grpc_context.set_trailing_metadata([(DETAILS_KEY, status)])
    return error


def _required(name: str, value: str | None) -> str:
    if not value:
        raise InvalidRequest(f"{name}: must be set", param=name)
    return value


def _session_id(grpc_context: RpcContext) -> str | None:
    metadata = text_metadata(grpc_context)
    return next((metadata[key] for key in SESSION_ID_KEYS if metadata.get(key)), None)


def _origin(grpc_context: RpcContext) -> Origin:
    metadata = text_metadata(grpc_context)
    request_id = next((metadata[key] for key in REQUEST_ID_KEYS if metadata.get(key)), "")
    return Origin(checked(metadata.get(TRACEPARENT)), checked_request_id(request_id))


def text_metadata(grpc_context: RpcContext) -> dict[str, str]:
    """What the client sent beside the request, as far as it is text."""
    return {key: value for key, value in grpc_context.invocation_metadata() or () if isinstance(value, str)}
