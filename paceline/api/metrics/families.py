"""Every metric there is, in tables. The order is that of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paceline.api.metrics import autoscaling, speculation
from paceline.api.metrics.family import Family, Sample, by_key, by_name, number, number_at, ranges, ranges_by_key
from paceline.api.state import ClusterStatus


def _kv_usage(target: Any) -> Iterator[Sample]:
    in_use, total = number_at(target, "kv_tokens_in_use"), number_at(target, "kv_tokens_total")
    if in_use is not None and total:
        yield (), in_use / total


def _tier(what: str) -> Mapping[str, str]:
    return {tier: f"kv_{tier}_{what}" for tier in ("host", "disk")}


def _warnings(target: Any) -> Iterator[Sample]:
    if isinstance(found := target.get("warnings"), list | tuple):
        yield (), len(found)


def _replicas(cluster: ClusterStatus) -> Iterator[Sample]:
    yield ("target",), len(cluster.targets)
    yield ("draft",), len(cluster.drafts)


def _routes(cluster: ClusterStatus) -> Iterator[Sample]:
    for reason, count in sorted(cluster.routes.items()):
        yield (reason,), count


def _requests(cluster: ClusterStatus) -> Iterator[Sample]:
    yield from sorted(cluster.requests.items())


def _resumptions(cluster: ClusterStatus) -> Iterator[Sample]:
    yield (), cluster.resumptions


LOAD = (
    Family("vllm:num_requests_running", "gauge", "Sequences in the engine's steps.", number("running")),
    Family("vllm:num_requests_waiting", "gauge", "Sequences that wait for a place.", number("waiting")),
    Family(
        "paceline_queued_prefill_tokens",
        "gauge",
        "Prompt tokens of waiting sequences, less those whose KV was held when they came.",
        number("queued_prefill_tokens"),
    ),
    Family("vllm:num_preemptions_total", "counter", "Sequences that had to yield.", number("telemetry", "preemptions")),
    Family(
        "vllm:request_success_total",
        "counter",
        "Requests that ended, by why: stop, length, abort.",
        by_key("telemetry", "finished"),
        ("finished_reason",),
    ),
    Family(
        "vllm:prompt_tokens_total",
        "counter",
        "Prompt tokens of requests that got a first token, those with KV included.",
        number("telemetry", "prompt_tokens"),
    ),
    Family("vllm:generation_tokens_total", "counter", "Tokens emitted.", number("telemetry", "generation_tokens")),
    Family("paceline_warnings", "gauge", "Things a replica warns of; /status has the words.", _warnings),
)

TIMES = (
    Family(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "From a request's arrival at the replica to its first token.",
        ranges("telemetry", "ttft_s"),
    ),
    Family(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "Between two deltas of a request, however many tokens the second brings.",
        ranges("telemetry", "gap_s"),
    ),
    Family(
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        "Mean time per token of a request, but for its first.",
        ranges("telemetry", "per_token_s"),
    ),
    Family(
        "vllm:e2e_request_latency_seconds",
        "histogram",
        "From a request's arrival at the replica to its last token.",
        ranges("telemetry", "total_s"),
    ),
    Family(
        "vllm:request_queue_time_seconds",
        "histogram",
        "From a request's arrival to its place in the engine's steps.",
        ranges("telemetry", "queue_s"),
    ),
    Family(
        "vllm:request_prefill_time_seconds",
        "histogram",
        "From there to its first token.",
        ranges("telemetry", "prefill_s"),
    ),
    Family(
        "vllm:request_decode_time_seconds",
        "histogram",
        "From its first token to its last.",
        ranges("telemetry", "decode_s"),
    ),
    Family(
        "vllm:request_prompt_tokens",
        "histogram",
        "Prompt tokens of a request that ended.",
        ranges("telemetry", "request_prompt_tokens"),
    ),
    Family(
        "vllm:request_generation_tokens",
        "histogram",
        "Tokens of its output.",
        ranges("telemetry", "request_generation_tokens"),
    ),
)

STEPS = (
    Family(
        "paceline_step_seconds",
        "histogram",
        "Time of an engine's step by phase: schedule (and admit), propose, forward, sample, emit (and commit).",
        ranges_by_key("telemetry", "step_s"),
        ("phase",),
    ),
    Family(
        "vllm:iteration_tokens_total",
        "histogram",
        "Tokens computed in a step: of prompts, latest ones, candidates.",
        ranges("telemetry", "step_tokens"),
    ),
)

KV = (
    Family("vllm:kv_cache_usage_perc", "gauge", "KV cache in use by running sequences, 0 to 1.", _kv_usage),
    Family("paceline_kv_tokens_cached", "gauge", "KV tokens of idle sessions.", number("kv_tokens_cached")),
    Family(
        "paceline_sessions",
        "gauge",
        "Sessions whose KV is held: running, idle in the KV cache, in host memory, on disk; each once, where it is "
        "soonest at hand.",
        by_key("sessions_by_state"),
        ("state",),
    ),
    Family(
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prompt tokens that were looked for among those with KV.",
        number("telemetry", "prefix_queries"),
    ),
    Family("vllm:prefix_cache_hits_total", "counter", "Of these those found.", number("telemetry", "prefix_hits")),
    Family(
        "paceline_kv_hit_tokens_total",
        "counter",
        "Prompt tokens whose KV was found, by where: device, host, disk.",
        by_key("telemetry", "kv_hits"),
        ("tier",),
    ),
    Family(
        "paceline_kv_tier_sessions",
        "gauge",
        "Idle sessions kept outside of the KV cache.",
        by_name(_tier("sessions")),
        ("tier",),
    ),
    Family(
        "paceline_kv_tier_tokens",
        "gauge",
        "KV tokens of idle sessions kept outside of the KV cache.",
        by_name(_tier("tokens")),
        ("tier",),
    ),
    Family("paceline_kv_tier_bytes", "gauge", "What they take.", by_name(_tier("bytes")), ("tier",)),
    Family(
        "paceline_kv_restores_total",
        "counter",
        "Sessions put back into the KV cache.",
        by_name(_tier("restores")),
        ("tier",),
    ),
    Family(
        "paceline_kv_restored_tokens_total",
        "counter",
        "KV tokens put back into the KV cache.",
        number("kv_restored_tokens"),
    ),
    Family(
        "paceline_kv_late_restores_total",
        "counter",
        "Sessions computed since they did not come in time.",
        number("kv_restores_late"),
    ),
    Family(
        "paceline_kv_failed_restores_total",
        "counter",
        "Sessions whose file was damaged or unreadable.",
        number("kv_restores_failed"),
    ),
    Family("paceline_kv_tier_drops_total", "counter", "Sessions for which no tier had room.", number("kv_tier_drops")),
)

HANDOFF = (
    Family(
        "paceline_handoff_sessions_total",
        "counter",
        "Sessions whose KV changed its replica: sent, received; failed; announced and missing. A replica that left is "
        "not asked any more: what it sent is what the others received.",
        by_name({what: f"handoff.{what}" for what in ("sent", "received", "failed", "missing")}),
        ("what",),
        "replica",
    ),
    Family(
        "paceline_handoff_bytes_total",
        "counter",
        "KV that did so.",
        by_name({direction: f"handoff.bytes_{direction}" for direction in ("sent", "received")}),
        ("direction",),
        "replica",
    ),
    Family(
        "paceline_handoff_seconds_total",
        "counter",
        "Time spent sending.",
        number("handoff", "seconds"),
        scope="replica",
    ),
)

ROUTER = (
    Family("paceline_replicas", "gauge", "Replicas that answered this scrape.", _replicas, ("kind",), "cluster"),
    Family(
        "paceline_requests_total",
        "counter",
        "HTTP requests by the path's template and the status; 499 is a client that left before there was one.",
        _requests,
        ("endpoint", "code"),
        "router",
    ),
    Family(
        "paceline_routed_requests_total",
        "counter",
        "Requests by why they went where they went.",
        _routes,
        ("reason",),
        "router",
    ),
    Family(
        "paceline_resumptions_total",
        "counter",
        "Target replicas lost in the middle of an answer.",
        _resumptions,
        scope="router",
    ),
)

SECTIONS: Mapping[str, tuple[Family, ...]] = {
    "Load": LOAD,
    "Times and sizes of requests": TIMES,
    "Steps": STEPS,
    "KV cache and sessions": KV,
    "Speculation": speculation.FAMILIES,
    "Drafters": speculation.DRAFTERS,
    "Hand-off": HANDOFF,
    "Router": ROUTER,
    "Autoscaling": autoscaling.FAMILIES,
}
FAMILIES = tuple(family for section in SECTIONS.values() for family in section)
