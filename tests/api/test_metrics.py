"""Prometheus text made of what the replicas report."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paceline.api.metrics import FAMILIES, Family, prometheus_text
from paceline.api.request_counts import RequestCounts
from paceline.api.state import ClusterStatus
from paceline.engine.engine import Engine
from paceline.engine.status import status_of
from paceline.engine.telemetry import Phase
from paceline.errors import Unavailable
from tests import tiny
from tests.api.scripted import MODEL, ScriptedTargets, http

TARGET: dict[str, Any] = {
    "replica_id": "t1",
    "running": 3,
    "waiting": 2,
    "kv_tokens_total": 400,
    "kv_tokens_in_use": 100,
    "kv_tokens_cached": 50,
    "sessions": 4,
    "sessions_by_state": {"running": 1, "idle": 3, "host": 2, "disk": 0},
    "drafters_connected": 1,
    "draft_bytes_sent": 1000,
    "draft_bytes_received": 70,
    "speculation": {
        "sources": {
            "remote": {"drafted": [10, 8], "accepted": [9, 5], "wasted": 7},
            "prompt_lookup": {"drafted": [4, 4, 2], "accepted": [3, 1, 0]},
        },
        "late": 6,
        "synthetic_acceptance": None,
    },
    "handoff": {
        "sent": 2,
        "received": 5,
        "failed": 1,
        "missing": 3,
        "bytes_sent": 200,
        "bytes_received": 500,
        "seconds": 0.5,
    },
    "draft_tokens_wanted": 40,
    "draft_saved_s": -1.5,
    "warnings": ["no drafter"],
}
DRAFT = {
    "replica_id": "d1",
    "streams": 2,
    "sequences": 5,
    "drafted_tokens": 99,
    "rolled_back_tokens": 11,
    "busy_s": 4.25,
}


def samples(*targets: dict[str, Any], drafts: tuple[dict[str, Any], ...] = ()) -> dict[tuple[str, ...], float]:
    """Value by name and labels but the model's, in the order of their names."""
    text = prometheus_text(MODEL, ClusterStatus(targets, drafts)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model_name")
            found[sample.name, *labels] = sample.value
    return found


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("vllm:num_requests_running", (), 3),
        ("vllm:num_requests_waiting", (), 2),
        ("paceline_handoff_sessions_total", ("what=received",), 5),
        ("paceline_handoff_sessions_total", ("what=missing",), 3),
        ("paceline_handoff_bytes_total", ("direction=sent",), 200),
        ("paceline_handoff_seconds_total", (), 0.5),
        ("vllm:kv_cache_usage_perc", (), 0.25),
        ("vllm:spec_decode_num_draft_tokens_total", (), 28),
        ("vllm:spec_decode_num_accepted_tokens_total", (), 18),
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ("position=0",), 12),
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ("position=2",), 0),
        ("paceline_drafted_tokens_total", ("position=1", "source=remote"), 8),
        ("paceline_accepted_tokens_total", ("position=1", "source=prompt_lookup"), 1),
        ("paceline_rolled_back_tokens_total", ("source=remote",), 4),
        ("paceline_late_drafts_total", (), 6),
        ("paceline_wasted_tokens_total", ("source=remote",), 7),
        ("paceline_drafters_connected", (), 1),
        ("paceline_draft_link_bytes_total", ("direction=sent",), 1000),
        ("paceline_sessions", ("state=idle",), 3),
        ("paceline_warnings", (), 1),
        ("paceline_draft_tokens_wanted_total", (), 40),
        ("paceline_draft_saved_seconds", (), -1.5),
    ],
)
def test_what_a_target_reports_is_told(name: str, labels: tuple[str, ...], value: float) -> None:
    assert samples(TARGET)[name, *sorted(("replica=t1", *labels))] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("paceline_drafter_tokens_total", 99),
        ("paceline_drafter_rolled_back_tokens_total", 11),
        ("paceline_drafter_streams", 2),
        ("paceline_drafter_sequences", 5),
        ("paceline_drafter_busy_seconds_total", 4.25),
    ],
)
def test_what_a_drafter_reports_is_told(name: str, value: float) -> None:
    assert samples(drafts=(DRAFT,))[name, "replica=d1"] == value


def test_replicas_that_answered_are_counted() -> None:
    found = samples(TARGET, {**TARGET, "replica_id": "t2"}, drafts=(DRAFT,))
    assert (found["paceline_replicas", "kind=target"], found["paceline_replicas", "kind=draft"]) == (2, 1)


def test_every_replica_has_a_series_of_its_own() -> None:
    found = samples(TARGET, {**TARGET, "replica_id": "t2", "running": 9})
    assert [found["vllm:num_requests_running", f"replica={name}"] for name in ("t1", "t2")] == [3, 9]


def test_the_model_is_a_label() -> None:
    assert b'vllm:num_requests_running{model_name="tiny",replica="t1"} 3.0' in prometheus_text(
        MODEL, ClusterStatus((TARGET,))
    )


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"replica_id": "x"},
        {"speculation": None},
        {"speculation": {"sources": {"remote": {"drafted": "many", "accepted": None}}}},
        {"speculation": {"sources": [1]}},
        {"running": "three", "kv_tokens_total": 0, "kv_tokens_in_use": 0, "warnings": 3},
    ],
)
def test_what_a_replica_of_another_version_leaves_out_is_missing(odd: dict[str, Any]) -> None:
    assert ("vllm:num_requests_running", "replica=t1") in samples(odd, TARGET)


def test_synthetic_acceptance_is_told_where_it_is_set() -> None:
    marked = {**TARGET, "speculation": {"synthetic_acceptance": 0.7}}
    assert samples(marked)["paceline_synthetic_acceptance", "replica=t1"] == 0.7
    assert ("paceline_synthetic_acceptance", "replica=t1") not in samples(TARGET)


TIERED = {
    **TARGET,
    "kv_tier_dtype": "lossless",
    **{f"kv_disk_{what}": n for n, what in enumerate(("sessions", "tokens", "bytes", "restores"), start=1)},
    "kv_restored_tokens": 50,
    "kv_restores_late": 6,
    "kv_restores_failed": 7,
    "kv_tier_drops": 8,
}


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("paceline_kv_tier_sessions", ("tier=disk",), 1),
        ("paceline_kv_tier_tokens", ("tier=disk",), 2),
        ("paceline_kv_tier_bytes", ("tier=disk",), 3),
        ("paceline_kv_restores_total", ("tier=disk",), 4),
        ("paceline_kv_restored_tokens_total", (), 50),
        ("paceline_kv_late_restores_total", (), 6),
        ("paceline_kv_failed_restores_total", (), 7),
        ("paceline_kv_tier_drops_total", (), 8),
    ],
)
def test_tiers_are_told_where_there_are_any(name: str, labels: tuple[str, ...], value: float) -> None:
    key = (name, "replica=t1", *labels)
    assert samples(TIERED)[key] == value
    assert key not in samples(TARGET)


def used_engine() -> Engine:
    """One that answered a request with speculation."""
    engine = tiny.engine_for(tiny.tiny_llama(), lookup=4)
    tiny.run(engine, tiny.request((5, 6, 7, 8) * 8, max_tokens=24))
    return engine


USED = used_engine()
ENGINE = USED.telemetry
FULL = {
    **TIERED,
    **status_of(USED),
    "speculation": {**TARGET["speculation"], "synthetic_acceptance": 0.7},
}


def whole_cluster() -> ClusterStatus:
    """Where every number is told."""
    scaled = {"target": {"wanted": 3, "signals": {"seats": 2.5}}}
    return ClusterStatus((FULL,), (DRAFT,), {"session": 3}, 1, {("/health", "200"): 2}, autoscaling=scaled)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_a_sample_where_its_numbers_are_told(family: Family) -> None:
    cluster = whole_cluster()
    text = prometheus_text(MODEL, cluster).decode()
    assert all(f"\n{series}{{" in text for series in family.series)


def test_no_name_is_there_twice() -> None:
    names = [name for family in FAMILIES for name in family.series]
    assert len(names) == len(set(names))


def test_nothing_is_told_that_no_family_names() -> None:
    cluster = whole_cluster()
    told = {line.split("{")[0] for line in prometheus_text(MODEL, cluster).decode().splitlines() if line[0] != "#"}
    assert told == {name for family in FAMILIES for name in family.series}


def test_a_histogram_is_told_as_it_was_noted() -> None:
    found = samples(FULL)
    noted, name = ENGINE.gap, "vllm:inter_token_latency_seconds"
    buckets = {key: value for key, value in found.items() if key[0] == f"{name}_bucket"}
    assert found[f"{name}_count", "replica=t1"] == buckets[f"{name}_bucket", "le=+Inf", "replica=t1"] == noted.count > 0
    assert found[f"{name}_sum", "replica=t1"] == noted.total
    assert list(buckets.values()) == list(itertools.accumulate(noted.counts))


def test_phases_are_told_apart() -> None:
    found = samples(FULL)
    forward = ENGINE.step.histograms[Phase.FORWARD]
    assert found["paceline_step_seconds_sum", "phase=forward", "replica=t1"] == forward.total


def test_labels_are_escaped() -> None:
    odd = 'a"b\\c\nd'
    text = prometheus_text(odd, ClusterStatus()).decode()
    (family,) = [each for each in text_string_to_metric_families(text) if each.name == "paceline_resumptions"]
    assert family.samples[0].labels["model_name"] == odd


async def test_the_front_end_serves_them() -> None:
    async with http() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'vllm:num_requests_running{model_name="tiny",replica="target-1"} 1.0' in response.text


async def test_silent_replicas_are_missing_and_no_error() -> None:
    class Silent(ScriptedTargets):
        async def status(self) -> ClusterStatus:
            raise Unavailable("the replicas did not answer")

    async with http(Silent()) as client:
        response = await client.get("/metrics")
    assert (response.status_code, 'paceline_replicas{model_name="tiny",kind="target"} 0.0' in response.text) == (
        200,
        True,
    )


async def counted(*asked: tuple[str, str]) -> dict[str, float]:
    """Requests by endpoint and code, after these were sent."""
    async with http() as client:
        for method, path in asked:
            await client.request(method, path)
        text = (await client.get("/metrics")).text
    (family,) = [each for each in text_string_to_metric_families(text) if each.name == "paceline_requests"]
    return {f"{sample.labels['endpoint']} {sample.labels['code']}": sample.value for sample in family.samples}


async def test_requests_are_counted_by_template_and_status() -> None:
    found = await counted(
        ("GET", "/health"), ("GET", "/v1/sessions/a"), ("GET", "/v1/sessions/b/c"), ("GET", "/health")
    )
    assert found == {"/health 200": 2, "/v1/sessions/{session_id:path} 404": 2}


async def test_paths_that_clients_make_up_are_one_endpoint() -> None:
    assert await counted(("GET", "/a"), ("POST", "/b/c"), ("PUT", "/d?e=f")) == {"other 404": 3}


async def test_a_request_that_ended_without_a_status_is_counted() -> None:
    counts = RequestCounts()

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await counts.counting(silent)({"type": "http"}, None, None)  # type: ignore[arg-type]
    assert counts.by_endpoint_and_code == {("other", "499"): 1}


def test_what_a_router_counted_has_its_name() -> None:
    text = prometheus_text(MODEL, ClusterStatus(resumptions=2, router="r1")).decode()
    assert 'paceline_resumptions_total{model_name="tiny",router="r1"} 2.0' in text


async def test_silent_replicas_leave_what_the_router_counted() -> None:
    class Silent(ScriptedTargets):
        async def status(self) -> ClusterStatus:
            raise Unavailable("the replicas did not answer")

    async with http(Silent()) as client:
        text = (await client.get("/metrics")).text
    assert 'paceline_resumptions_total{model_name="tiny",router=""} 0.0' in text


def test_what_the_autoscaler_wants_and_why() -> None:
    told = {
        "target": {"wanted": 3, "signals": {"seats": 2.5}},
        "draft": {"wanted": 1},
        "counts": {"target/up/seats": 2},
        "errors": 1,
        "waiting": ["1 of 3 target replicas run, …"],
    }
    text = prometheus_text("m", ClusterStatus(autoscaling=told)).decode()
    for line in (
        'paceline_autoscaling_replicas_wanted{model_name="m",pool="target"} 3.0',
        'paceline_autoscaling_replicas_wanted{model_name="m",pool="draft"} 1.0',
        'paceline_autoscaling_signal{model_name="m",pool="target",signal="seats"} 2.5',
        'paceline_autoscaling_decisions_total{model_name="m",pool="target",reason="seats",direction="up"} 2.0',
        'paceline_autoscaling_decisions_total{model_name="m",pool="draft",reason="gain",direction="down"} 0.0',
        'paceline_autoscaling_errors_total{model_name="m"} 1.0',
        'paceline_autoscaling_waiting{model_name="m"} 1.0',
    ):
        assert line in text.splitlines(), line
