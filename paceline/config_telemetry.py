"""Settings of what a server tells about itself: traces and logs. Metrics are always there, at /metrics."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from paceline.config_base import Settings


class TelemetrySettings(Settings):
    """Traces and logs."""

    otlp_endpoint: str | None = Field(
        None,
        description="Where traces go: an OpenTelemetry collector's OTLP address, such as http://localhost:4317 (gRPC) "
        "or http://localhost:4318/v1/traces (HTTP). null is nowhere. Needs `pip install paceline[otel]`.",
    )
    trace_sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of the requests that are traced; one that comes with a `traceparent` follows that."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Logs of the replicas: text, or a JSON object a line, with request and session ids."
    )
    log_requests: bool = Field(
        False, description="Log a line for each request that ended: its tokens, seconds and candidates; never its text."
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _an_address(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        try:
            parts = urlsplit(endpoint)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"must be like http://localhost:4317, got {endpoint!r}")
        return endpoint
