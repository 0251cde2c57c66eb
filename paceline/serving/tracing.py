"""Ray Serve's own spans, of its proxy in Python and its replicas, beside ours and in the same traces.

Serve calls one of the functions below in each of its processes, by the import path in
RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH, and gives it nothing. So the exporters find their collector as OpenTelemetry's
own do: by OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from paceline.config import TelemetrySettings
from paceline.telemetry.tracing import otlp_url, protocol_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


def serve_environment(settings: TelemetrySettings) -> Mapping[str, str]:
    """What has Serve trace; nothing if nobody does."""
    if settings.otlp_endpoint is None:
        return {}
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": f"{__name__}:over_{protocol_of(settings.otlp_endpoint)}",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(settings.trace_sample_ratio),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp_url(settings.otlp_endpoint),
        "OTEL_SERVICE_NAME": "ray-serve",
    }


def over_grpc() -> list[SpanProcessor]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    from paceline.telemetry.otel import batched

    return [batched(OTLPSpanExporter(), "the collector of Ray Serve's spans")]


def over_http() -> list[SpanProcessor]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from paceline.telemetry.otel import batched

    return [batched(OTLPSpanExporter(), "the collector of Ray Serve's spans")]
