"""The seam to distributed tracing: spans go to an OpenTelemetry collector, or nowhere.

Whoever works on a request opens one span, hands its `traceparent` on with the request (W3C Trace Context), and ends it
with what is known then. Nothing here waits, whatever becomes of the spans.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol
from urllib.parse import urlsplit

from paceline.config_telemetry import TelemetrySettings
from paceline.errors import ConfigError

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value | None]
"""None stands for "not known", and is left out."""
Kind = Literal["server", "internal"]

TRACEPARENT = "traceparent"
"""The HTTP header and gRPC metadata key."""
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_EXPORTERS = {"grpc": "opentelemetry.exporter.otlp.proto.grpc", "http": "opentelemetry.exporter.otlp.proto.http"}
_HTTP_PORT = 4318
"""OTLP's own for HTTP; 4317 is gRPC's."""
_HTTP_PATH = "/v1/traces"


class Span(Protocol):
    """One piece of work. Times are nanoseconds since 1970, None is now."""

    @property
    def traceparent(self) -> str:
        """For whoever does a part of this work elsewhere; "" if nobody traces."""
        ...

    def child(self, name: str, began: int, ended: int, attributes: Attributes | None = None) -> None:
        """A part of this work, over already."""
        ...

    def end(self, attributes: Attributes | None = None, *, ended: int | None = None, error: str = "") -> None:
        """It is over, and was in vain if there is an `error`."""
        ...


class Tracer(ABC):
    """Opens spans. Cheap where nobody traces; never blocks, never raises."""

    @abstractmethod
    def start(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: str = "",
        began: int | None = None,
        attributes: Attributes | None = None,
    ) -> Span:
        """A span below `parent`, a traceparent; one that is none, or "", begins a trace."""

    @abstractmethod
    def current(self) -> str:
        """The traceparent of a span that others, such as Ray Serve, have made current here; "" if nobody has."""

    @abstractmethod
    def close(self) -> None:
        """Send what waits, as far as there is time. May take some seconds."""


@dataclass(frozen=True, slots=True)
class _NoSpan:
    traceparent: str

    def child(self, name: str, began: int, ended: int, attributes: Attributes | None = None) -> None:
        pass

    def end(self, attributes: Attributes | None = None, *, ended: int | None = None, error: str = "") -> None:
        pass


class NoTracer(Tracer):
    """Nobody traces. A client's traceparent is passed on all the same, for the logs."""

    def start(
        self,
        name: str,  # noqa: ARG002
        *,
        kind: Kind = "internal",  # noqa: ARG002
        parent: str = "",
        began: int | None = None,  # noqa: ARG002
        attributes: Attributes | None = None,  # noqa: ARG002
    ) -> Span:
        return _NoSpan(parent)

    def current(self) -> str:
        return ""

    def close(self) -> None:
        pass


def open_tracer(settings: TelemetrySettings, service: str, instance: str) -> Tracer:
    """For one process: `service` is what it is, such as paceline-router, `instance` which of them.

    Raises ConfigError if the packages are missing.
    """
    if settings.otlp_endpoint is None:
        return NoTracer()
    check_packages(settings)
    from paceline.telemetry.otel import OtelTracer

    return OtelTracer.exporting(settings.otlp_endpoint, settings.trace_sample_ratio, service, instance)


def check_packages(settings: TelemetrySettings) -> None:
    """Raise ConfigError if spans are to be sent and the packages that send them are missing."""
    if settings.otlp_endpoint is None:
        return
    try:
        found = find_spec(_EXPORTERS[protocol_of(settings.otlp_endpoint)]) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(
            "telemetry.otlp_endpoint: the OpenTelemetry packages are missing; run `pip install paceline[otel]`, "
            "or leave it out",
            param="telemetry.otlp_endpoint",
        )


def protocol_of(endpoint: str) -> Literal["grpc", "http"]:
    """Which of OTLP's two protocols an address is for: HTTP has a path, or HTTP's port."""
    parts = urlsplit(endpoint)
    return "http" if parts.path.strip("/") or parts.port == _HTTP_PORT else "grpc"


def otlp_url(endpoint: str) -> str:
    """The address as an exporter wants it: HTTP has a path of its own for traces."""
    bare = protocol_of(endpoint) == "http" and not urlsplit(endpoint).path.strip("/")
    return endpoint.rstrip("/") + _HTTP_PATH if bare else endpoint


def checked(traceparent: str | None) -> str:
    """A client's traceparent, or "" if it is none: then its trace begins here, as W3C Trace Context has it."""
    return traceparent if traceparent is not None and _TRACEPARENT.fullmatch(traceparent) else ""


def trace_id(traceparent: str) -> str | None:
    """Of the trace it belongs to, in hexadecimal digits."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found.group(1) if found else None
