"""Prometheus text made of what the replicas report."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paceline.api.metrics import prometheus_text
from paceline.api.state import ClusterStatus
from paceline.errors import Unavailable
from tests.api.scripted import MODEL, ScriptedTargets, http

TARGET: dict[str, Any] = {
    "replica_id": "t1",
    "running": 3,
    "waiting": 2,
    "kv_tokens_total": 400,
    "kv_tokens_in_use": 100,
    "kv_tokens_cached": 50,
    "sessions": 4,
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
    "warnings": ["no drafter"],
}
DRAFT = {"replica_id": "d1", "streams": 2, "sequences": 5, "drafted_tokens": 99, "rolled_back_tokens": 11}


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
        ("paceline_sessions", (), 4),
        ("paceline_warnings", (), 1),
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
    assert (response.status_code, 'paceline_replicas{kind="target"} 0.0' in response.text) == (200, True)
