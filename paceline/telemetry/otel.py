"""Spans of OpenTelemetry's SDK, exported by a thread in the background. Imported only where traces are wanted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from paceline.telemetry.tracing import TRACEPARENT, Attributes, Kind, Span, Tracer, Value, otlp_url, protocol_of

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0
"""What waits for a collector that does not answer is lost then."""
SCHEDULE_MS = 1000.0
"""Between two exports: a replica that is killed takes so much with it."""
_KINDS = {"server": trace.SpanKind.SERVER, "internal": trace.SpanKind.INTERNAL}
_CONTEXT = TraceContextTextMapPropagator()


class OtelTracer(Tracer):
    """Over a provider of its own: nothing global is set, others in this process may trace as they like."""

    def __init__(self, processor: SpanProcessor, sample_ratio: float, service: str, instance: str) -> None:
        release = version("paceline")
        resource = Resource.create({SERVICE_NAME: service, SERVICE_INSTANCE_ID: instance, SERVICE_VERSION: release})
        self._provider = TracerProvider(ParentBasedTraceIdRatio(sample_ratio), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("paceline", release)

    @classmethod
    def exporting(cls, endpoint: str, sample_ratio: float, service: str, instance: str) -> OtelTracer:
        """To a collector. OpenTelemetry's own environment variables hold for what is not said here: headers,
        certificates, compression."""
        return cls(batched(_exporter(endpoint), endpoint), sample_ratio, service, instance)

    def start(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: str = "",
        began: int | None = None,
        attributes: Attributes | None = None,
    ) -> Span:
        # An empty context, not None: what this thread happens to be in is nobody's parent here.
        context = _CONTEXT.extract({TRACEPARENT: parent}, Context()) if parent else Context()
        span = self._tracer.start_span(name, context, _KINDS[kind], _known(attributes), start_time=began)
        return _OtelSpan(self._tracer, span)

    def current(self) -> str:
        return traceparent_of(trace.get_current_span())

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracer", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


class _OtelSpan:
    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def traceparent(self) -> str:
        return traceparent_of(self._span)

    def child(self, name: str, began: int, ended: int, attributes: Attributes | None = None) -> None:
        if not self._span.is_recording():
            return
        context = trace.set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, context, attributes=_known(attributes), start_time=began)
        span.end(max(began, ended))

    def end(self, attributes: Attributes | None = None, *, ended: int | None = None, error: str = "") -> None:
        if self._span.is_recording():
            self._span.set_attributes(_known(attributes))
            if error:
                self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(ended)


class _Reporting(SpanExporter):
    """Says once that a collector does not take spans, and once that it does again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint = exporter, endpoint
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failing:
            logger.warning("traces are lost: %s does not take them; requests go on", self._endpoint)
        elif self._failing and not failed:
            logger.warning("traces reach %s again", self._endpoint)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def batched(exporter: SpanExporter, where: str) -> SpanProcessor:
    """What takes ended spans and sends them now and then, in a thread of its own; what is too much is dropped."""
    # They would repeat themselves at every attempt; _Reporting says it once.
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.ERROR)
    return BatchSpanProcessor(_Reporting(exporter, where), schedule_delay_millis=SCHEDULE_MS)


def traceparent_of(span: trace.Span) -> str:
    """As W3C Trace Context writes it; "" for a span of no trace."""
    carrier: dict[str, str] = {}
    _CONTEXT.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get(TRACEPARENT, "")


def _exporter(endpoint: str) -> SpanExporter:
    if protocol_of(endpoint) == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc(endpoint, timeout=EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    return OverHttp(otlp_url(endpoint), timeout=EXPORT_TIMEOUT_S)


def _known(attributes: Attributes | None) -> dict[str, Value]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
