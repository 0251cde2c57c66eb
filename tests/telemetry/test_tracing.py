"""The seam to tracing: what a span becomes, what is passed on, and what happens without a collector."""

from __future__ import annotations

import logging
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from paceline.config import AppSettings, TelemetrySettings
from paceline.errors import ConfigError
from paceline.telemetry import tracing
from paceline.telemetry.otel import OtelTracer
from paceline.telemetry.tracing import NoTracer, check_packages, checked, open_tracer, otlp_url, protocol_of, trace_id
from tests.telemetry.collector import Collector
from tests.telemetry.recorded import CLIENT, CLIENT_SPAN, CLIENT_TRACE, Recorded, about, parent_of, span_id, trace_of

UNSAMPLED = CLIENT[:-2] + "00"


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "ff" + CLIENT[2:],
        CLIENT.upper(),
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        CLIENT + "\nx: y",
    ],
)
def test_what_is_no_traceparent_counts_as_not_sent(sent: str | None) -> None:
    assert checked(sent) == ""


def test_a_traceparent_passes_as_it_is() -> None:
    assert checked(CLIENT) == CLIENT


def test_a_trace_is_known_by_its_id() -> None:
    assert (trace_id(CLIENT), trace_id("")) == ("0af7651916cd43dd8448eb211c80319c", None)


def test_a_span_is_a_child_of_the_client_s() -> None:
    recorded = Recorded()
    recorded.tracer.start("s", parent=CLIENT).end()
    assert (trace_of(recorded.spans["s"]), parent_of(recorded.spans["s"])) == (CLIENT_TRACE, CLIENT_SPAN)


def test_a_span_without_a_parent_begins_a_trace() -> None:
    recorded = Recorded()
    recorded.tracer.start("s").end()
    assert parent_of(recorded.spans["s"]) is None


def test_what_a_span_passes_on_makes_another_its_child() -> None:
    recorded = Recorded()
    above = recorded.tracer.start("above")
    recorded.tracer.start("below", parent=above.traceparent).end()
    above.end()
    assert parent_of(recorded.spans["below"]) == span_id(recorded.spans["above"])


def test_a_child_has_the_times_that_were_noted() -> None:
    recorded = Recorded()
    span = recorded.tracer.start("s")
    span.child("part", 1_000, 3_000, {"tokens": 4})
    span.end()
    part = recorded.spans["part"]
    assert (part.start_time, part.end_time, about(part)) == (1_000, 3_000, {"tokens": 4})
    assert parent_of(part) == span_id(recorded.spans["s"])


def test_what_is_not_known_is_left_out() -> None:
    recorded = Recorded()
    recorded.tracer.start("s", attributes={"a": 1, "b": None}).end({"c": None, "d": "x"})
    assert about(recorded.spans["s"]) == {"a": 1, "d": "x"}


def test_an_error_is_the_span_s_status() -> None:
    recorded = Recorded()
    recorded.tracer.start("s").end(error="timeout")
    status = recorded.spans["s"].status
    assert (status.is_ok, status.description) == (False, "timeout")


def test_what_a_client_does_not_sample_is_not_sampled_here() -> None:
    recorded = Recorded()
    span = recorded.tracer.start("s", parent=UNSAMPLED)
    span.child("part", 1, 2)
    span.end()
    assert recorded.spans == {}


def test_what_is_not_sampled_says_so_to_others() -> None:
    flags = Recorded(sample_ratio=0).tracer.start("s").traceparent[-2:]
    assert int(flags, 16) & 1 == 0


def test_what_a_client_samples_is_sampled_here() -> None:
    recorded = Recorded(sample_ratio=0)
    recorded.tracer.start("s", parent=CLIENT).end()
    assert list(recorded.spans) == ["s"]


def test_without_an_endpoint_nobody_traces() -> None:
    assert isinstance(open_tracer(TelemetrySettings(), "paceline-test", "one"), NoTracer)


def test_without_a_tracer_a_client_s_trace_is_passed_on() -> None:
    assert NoTracer().start("s", parent=CLIENT).traceparent == CLIENT


@pytest.mark.parametrize(
    ("endpoint", "protocol"),
    [
        ("http://localhost:4317", "grpc"),
        ("https://collector.example", "grpc"),
        ("http://localhost:4318", "http"),
        ("http://localhost:4318/v1/traces", "http"),
        ("https://collector.example/otlp/v1/traces", "http"),
    ],
)
def test_the_address_says_which_protocol_is_spoken(endpoint: str, protocol: str) -> None:
    assert protocol_of(endpoint) == protocol


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://h:4317", "http://h:4317"),
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/otlp/v1/traces", "https://h/otlp/v1/traces"),
    ],
)
def test_an_exporter_is_given_the_path_that_a_person_left_out(endpoint: str, url: str) -> None:
    assert otlp_url(endpoint) == url


def test_a_span_that_others_made_current_is_known() -> None:
    recorded = Recorded()
    assert recorded.tracer.current() == ""
    with recorded.tracer._tracer.start_as_current_span("theirs"):
        current = recorded.tracer.current()
    assert current.split("-")[2] == f"{span_id(recorded.spans['theirs']):016x}"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://", "http://h:99999", "h"])
def test_an_endpoint_that_is_none_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.otlp_endpoint\n.*must be like http://localhost:4317"):
        AppSettings.model_validate({"telemetry": {"otlp_endpoint": endpoint}})


@pytest.mark.parametrize("endpoint", ["http://localhost:4317", "http://localhost:4318"])
def test_missing_packages_are_named_with_their_remedy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tracing, "find_spec", missing)
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint: .*pip install paceline\[otel\]"):
        check_packages(TelemetrySettings(otlp_endpoint=endpoint))


def test_without_an_endpoint_no_packages_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    check_packages(TelemetrySettings())


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_spans_reach_a_collector(over: str) -> None:
    with Collector() as collector:
        endpoint = collector.grpc if over == "grpc" else collector.http
        tracer = open_tracer(TelemetrySettings(otlp_endpoint=endpoint), "paceline-test", "one")
        tracer.start("s", parent=CLIENT).end()
        tracer.close()
        (span,) = collector.spans
    assert (span.name, span.service, span.trace) == ("s", "paceline-test", f"{CLIENT_TRACE:032x}")


def test_a_collector_that_takes_nothing_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with Collector() as collector:
        collector.refuses = True
        tracer = OtelTracer.exporting(collector.grpc, 1.0, "paceline-test", "one")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                tracer.start("s").end()
                tracer._provider.force_flush()
        tracer.close()
    told = f"traces are lost: {collector.grpc} does not take them; requests go on"
    assert [record.message for record in caplog.records] == [told]


def test_a_collector_that_comes_back_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    with Collector() as collector:
        tracer = OtelTracer.exporting(collector.grpc, 1.0, "paceline-test", "one")
        with caplog.at_level(logging.WARNING):
            for refused in (True, False):
                collector.refuses = refused
                tracer.start("s").end()
                tracer._provider.force_flush()
        tracer.close()
    assert [record.message.split(":")[0] for record in caplog.records] == ["traces are lost", "traces reach http"]


def test_nothing_global_is_set() -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    Recorded()
    assert trace.get_tracer_provider() is before


def test_a_collector_is_what_it_says() -> None:
    with Collector() as collector, grpc.insecure_channel(collector.grpc.removeprefix("http://")) as channel:
        export = channel.unary_unary(
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            request_serializer=ExportTraceServiceRequest.SerializeToString,
        )
        with futures.ThreadPoolExecutor() as pool:
            pool.submit(export, ExportTraceServiceRequest()).result(30)
        assert collector.spans == []
