"""An OpenTelemetry collector in this process: it keeps the spans it is sent, over gRPC and over HTTP."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Received:
    """A span as it came: ids in hexadecimal digits, times in nanoseconds since 1970."""

    name: str
    service: str
    instance: str
    trace: str
    span: str
    parent: str
    began: int
    ended: int
    about: dict[str, Any]


class Collector(TraceServiceServicer):
    """A context manager; `refuses` makes it fail every export, for good."""

    def __init__(self) -> None:
        self.refuses = False
        self._spans: list[Received] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)
        self.grpc = f"http://{HOST}:{self._server.add_insecure_port(f'{HOST}:0')}"
        self._server.start()
        self._web = ThreadingHTTPServer((HOST, 0), _handler(self))
        self.http = f"http://{HOST}:{self._web.server_address[1]}/v1/traces"
        threading.Thread(target=self._web.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()
        self._web.shutdown()
        self._web.server_close()

    @property
    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._spans)

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        if self.refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        self.take(request)
        return ExportTraceServiceResponse()

    def take(self, request: ExportTraceServiceRequest) -> None:
        found = [
            _received(span, _plain(resource.resource.attributes))
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found


def _received(span: Any, whose: dict[str, Any]) -> Received:
    return Received(
        span.name,
        whose["service.name"],
        whose["service.instance.id"],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _plain(span.attributes),
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _handler(collector: Collector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            ok = self.path == "/v1/traces"
            if ok:
                collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if ok else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
