"""The public gRPC service behind a real server on this machine, and the errors of its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from paceline.api import Targets
from paceline.errors import PacelineError
from paceline.rpc.inference_server import add_inference_servicer
from paceline.rpc.inference_service import InferenceHandlers
from paceline.rpc.rich_errors import error_of
from paceline.v1 import inference_pb2_grpc as pb_grpc
from tests.api.scripted import gateway

OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


@asynccontextmanager
async def serving(handlers: InferenceHandlers, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[str]:
    """The address of a server of these handlers, with TLS if there are credentials."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    add_inference_servicer(handlers, server)
    any_port = "127.0.0.1:0"
    port = server.add_secure_port(any_port, credentials) if credentials else server.add_insecure_port(any_port)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def stub_of(targets: Targets | None = None, **options: Any) -> AsyncIterator[Any]:
    """A stub of the service over scripted replicas, or over others."""
    async with (
        serving(InferenceHandlers(gateway(targets, **options))) as address,
        grpc.aio.insecure_channel(address, OPTIONS) as channel,
    ):
        yield pb_grpc.InferenceStub(channel)


async def failed(call: Any) -> tuple[grpc.StatusCode, str]:
    """The code and details with which a call ends."""
    error = await ended(call)
    return error.code(), error.details() or ""


async def refused(call: Any) -> PacelineError:
    """The same as one of our errors, with all that its details tell."""
    error = await ended(call)
    return error_of(error.code(), error.details() or "", error.trailing_metadata())


async def ended(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value
