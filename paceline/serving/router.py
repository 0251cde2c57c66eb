"""The ingress: OpenAI-compatible HTTP and gRPC, both over one gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from paceline.api.access import Access
from paceline.api.gateway import Gateway
from paceline.api.keys import open_keys
from paceline.api.observed import Observer
from paceline.api.routes import create_app
from paceline.config import AppSettings
from paceline.models import load_config, load_tokenizer, resolve
from paceline.models.positions import shift_refusal
from paceline.rpc.inference_access import InferenceAccess
from paceline.serving.handles import ServeTargets
from paceline.serving.journal import ClusterKeyValue, autoscaling_status
from paceline.serving.leaving import longest_leaving_s
from paceline.serving.logs import join_serve_logs
from paceline.serving.nodes import RayNodes
from paceline.sessions.handoff import Move
from paceline.sessions.rules import WindowRules
from paceline.sessions.stores import open_store
from paceline.speculation.grammar_check import check_grammar
from paceline.telemetry.tracing import Tracer, open_tracer
from paceline.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)


class Router:
    """Holds no request state of its own but histories of sessions, in a store. Decorated and bound by
    `paceline.serving.app.build`.

    Serve's gRPC proxy finds a method by the rpc's name; its HTTP proxy the application below.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: AppSettings, target: DeploymentHandle, draft: DeploymentHandle | None = None
    ) -> None:
        self._settings = settings
        join_serve_logs(settings.telemetry)
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        self._tracer = open_tracer(settings.telemetry, "paceline-router", replica)
        self._keys = await asyncio.to_thread(open_keys, settings.api_keys)
        if self._keys is None:
            logger.warning("no api_keys are configured: whoever reaches the HTTP or gRPC port may use it")
        tokenizer, windows = await asyncio.to_thread(_load, settings)
        scaled = partial(autoscaling_status, settings, context.app_name, ClusterKeyValue())
        self._targets = ServeTargets(target, draft, scaled)
        self._gateway = Gateway(
            self._targets,
            tokenizer,
            settings.public_name,
            windows.largest,
            settings.request_timeout_s,
            settings.target.engine.scheduling_policy,
            settings.speculation.synthetic_acceptance,
            windows,
            max_resumptions=settings.max_resumptions,
            store=await asyncio.to_thread(
                open_store, settings.sessions.store, settings.sessions.ttl_s, settings.sessions.password_environment
            ),
            tool_call_parser=settings.tool_call_parser,
            check_grammar=check_grammar,
            limits=settings.limits,
            router=replica,
            observer=_observer(settings, self._tracer),
            nodes=RayNodes(settings, context.app_name, longest_leaving_s(settings)),
        )
        self._rpc = InferenceAccess(self._gateway, self._keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        access = None if self._keys is None else Access(self._keys, self._settings.api_keys)
        return create_app(
            self._gateway,
            request_ids=False,  # Serve's proxy adds them
            limits=self._settings.limits,
            access=access,
            cors_allow_origins=self._settings.cors_allow_origins,
        )

    async def moved(self, moves: list[Move]) -> None:
        """A target tells of sessions it hands over."""
        await self._targets.moved(moves)

    async def Chat(self, request: pb.ChatRequest, grpc_context: Any) -> AsyncIterator[pb.GenerateEvent]:
        with self._rpc.admitted(grpc_context) as handlers:
            async with aclosing(handlers.Chat(request, grpc_context)) as events:
                async for event in events:
                    yield event

    async def Generate(self, request: pb.GenerateRequest, grpc_context: Any) -> AsyncIterator[pb.GenerateEvent]:
        with self._rpc.admitted(grpc_context) as handlers:
            async with aclosing(handlers.Generate(request, grpc_context)) as events:
                async for event in events:
                    yield event

    async def Abort(self, request: pb.AbortRequest, grpc_context: Any) -> pb.AbortResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Abort(request, grpc_context)

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: Any) -> pb.TokenizeResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Tokenize(request, grpc_context)

    async def Detokenize(self, request: pb.DetokenizeRequest, grpc_context: Any) -> pb.DetokenizeResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Detokenize(request, grpc_context)

    async def ListModels(self, request: pb.ListModelsRequest, grpc_context: Any) -> pb.ListModelsResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.ListModels(request, grpc_context)

    async def CreateSession(self, request: pb.CreateSessionRequest, grpc_context: Any) -> pb.Session:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.CreateSession(request, grpc_context)

    async def ForkSession(self, request: pb.ForkSessionRequest, grpc_context: Any) -> pb.Session:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.ForkSession(request, grpc_context)

    async def ListSessions(self, request: pb.ListSessionsRequest, grpc_context: Any) -> pb.ListSessionsResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.ListSessions(request, grpc_context)

    async def GetSession(self, request: pb.GetSessionRequest, grpc_context: Any) -> pb.Session:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.GetSession(request, grpc_context)

    async def CloseSession(self, request: pb.CloseSessionRequest, grpc_context: Any) -> pb.CloseSessionResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.CloseSession(request, grpc_context)

    async def MoveSession(self, request: pb.MoveSessionRequest, grpc_context: Any) -> pb.Session:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.MoveSession(request, grpc_context)

    async def Status(self, request: pb.StatusRequest, grpc_context: Any) -> pb.StatusResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Status(request, grpc_context)

    async def Relieve(self, request: pb.RelieveRequest, grpc_context: Any) -> pb.RelieveResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Relieve(request, grpc_context)

    async def Drain(self, request: pb.DrainRequest, grpc_context: Any) -> pb.DrainResponse:
        with self._rpc.admitted(grpc_context) as handlers:
            return await handlers.Drain(request, grpc_context)

    async def __del__(self) -> None:
        """Awaited by Serve on a graceful shutdown, also of a replica that is still loading."""
        if hasattr(self, "_gateway"):
            await self._gateway.close()
            await self._targets.close()
            await asyncio.to_thread(self._tracer.close)


def _observer(settings: AppSettings, tracer: Tracer) -> Observer | None:
    """None if nobody wants to hear of requests: it would look at every frame."""
    wanted = settings.telemetry
    if wanted.otlp_endpoint is None and not wanted.log_requests:
        return None
    return Observer(tracer, settings.public_name, log_requests=wanted.log_requests, within=tracer.current)


def _load(settings: AppSettings) -> tuple[Any, WindowRules]:
    """The tokenizer, and how long a text a target takes."""
    path, engine = resolve(settings.model).path, settings.target.engine
    config = load_config(path)
    own = int(getattr(config, "max_position_embeddings", 2048))
    limit = own if engine.max_model_len == "auto" else min(own, engine.max_model_len)
    rules = WindowRules(limit, engine.ctx_size, engine.n_keep, engine.n_discard, shift_refusal(config))
    return load_tokenizer(path), rules
