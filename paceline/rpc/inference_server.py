"""How the public service is added to a server: Ray Serve's gRPC proxies, or a plain one.

gRPC answers bytes that are no message with UNKNOWN and the parser's exception, and passes on messages of any size.
Here they reach the handlers as `Unreadable`, which refuse them as they refuse other input. Imported by every proxy, so
this module imports little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from paceline.v1 import inference_pb2_grpc

MAX_MESSAGE_BYTES = 8 << 20
"""Of a request; as HTTP's bodies."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a request that is none."""

    why: str


def add_inference_servicer(servicer: Any, server: Any) -> None:
    """As the generated `add_InferenceServicer_to_server`: to be named in Serve's `grpc_servicer_functions`."""
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, _Registry(server))


class _Registry:
    """The part of a server that generated code registers with. What is registered reads bytes leniently."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same methods come by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        lenient = {name: _lenient(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)


def _lenient(handler: Any) -> Any:
    if handler.response_streaming:
        make, behavior = grpc.unary_stream_rpc_method_handler, handler.unary_stream
    else:
        make, behavior = grpc.unary_unary_rpc_method_handler, handler.unary_unary
    return make(behavior, _reader(handler.request_deserializer), handler.response_serializer)


def _reader(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unreadable]:
    def read(raw: bytes) -> Message | Unreadable:
        if len(raw) > MAX_MESSAGE_BYTES:
            return Unreadable(f"the request has {len(raw)} bytes; at most {MAX_MESSAGE_BYTES} are read")
        try:
            return parse(raw)
        except DecodeError:
            return Unreadable("the request is not a message of paceline.v1, or a text in it is not UTF-8")

    return read
