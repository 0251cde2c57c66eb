"""GET /metrics: what the replicas report about themselves, as Prometheus text.

Collected when it is asked for, from the same numbers as /status. A replica that does not answer is missing, and its
series with it; counters begin anew with a replica, which has a new name then. What is counted per router is that of
the one that answers. Names are vLLM's where the meaning is
the same, so that its dashboards work; ours begin with `paceline_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.api.state import ClusterStatus, ReplicaStatus

CONTENT_TYPE = CONTENT_TYPE_LATEST


def prometheus_text(model: str, cluster: ClusterStatus) -> bytes:
    """Every metric of every replica that answered."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Cluster(model, cluster))
    return generate_latest(registry)


class _Cluster(Collector):
    def __init__(self, model: str, cluster: ClusterStatus) -> None:
        self._model = model
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        targets, drafts = self._cluster.targets, self._cluster.drafts
        replicas = GaugeMetricFamily("paceline_replicas", "Replicas that answered this scrape.", labels=["kind"])
        replicas.add_metric(["target"], len(targets))
        replicas.add_metric(["draft"], len(drafts))
        yield replicas
        yield from self._load(targets)
        yield from self._tiers(targets)
        yield from self._speculation(targets)
        yield from self._links(targets)
        yield from self._handoff((*targets, *drafts))
        yield from self._drafters(drafts)
        yield from self._router()

    def _load(self, targets: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Sequences in the engine's steps.", targets, "running")
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait for a place.", targets, "waiting")
        usage = self._family(
            GaugeMetricFamily, "vllm:kv_cache_usage_perc", "KV cache in use by running sequences, 0 to 1."
        )
        for target in targets:
            in_use, total = _number(target.get("kv_tokens_in_use")), _number(target.get("kv_tokens_total"))
            if in_use is not None and total:
                usage.add_metric(self._labels(target), in_use / total)
        yield usage
        yield self._gauge("paceline_kv_tokens_cached", "KV tokens of idle sessions.", targets, "kv_tokens_cached")
        yield self._gauge("paceline_sessions", "Sessions whose KV cache is held.", targets, "sessions")

    def _tiers(self, targets: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        texts = {
            "sessions": "Idle sessions kept outside of the KV cache.",
            "tokens": "KV tokens of idle sessions kept outside of the KV cache.",
            "bytes": "What they take.",
        }
        gauges = {
            what: self._family(GaugeMetricFamily, f"paceline_kv_tier_{what}", text, "tier")
            for what, text in texts.items()
        }
        restores = self._family(
            CounterMetricFamily, "paceline_kv_restores", "Sessions put back into the KV cache.", "tier"
        )
        for target in targets:
            for tier in ("host", "disk"):
                for what, family in {**gauges, "restores": restores}.items():
                    if (value := _number(target.get(f"kv_{tier}_{what}"))) is not None:
                        family.add_metric([*self._labels(target), tier], value)
        yield from (*gauges.values(), restores)
        for name, text, key in (
            ("restored_tokens", "KV tokens put back into the KV cache.", "kv_restored_tokens"),
            ("late_restores", "Sessions computed since they did not come in time.", "kv_restores_late"),
            ("failed_restores", "Sessions whose file was damaged or unreadable.", "kv_restores_failed"),
            ("tier_drops", "Sessions for which no tier had room.", "kv_tier_drops"),
        ):
            yield self._counter(f"paceline_kv_{name}", text, targets, key)

    def _speculation(self, targets: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        drafted = self._family(
            CounterMetricFamily, "vllm:spec_decode_num_draft_tokens", "Candidates verified, of all sources."
        )
        accepted = self._family(
            CounterMetricFamily, "vllm:spec_decode_num_accepted_tokens", "Candidates that became output."
        )
        per_place = self._family(
            CounterMetricFamily,
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Candidates that became output, by their place in the run, from 0.",
            "position",
        )
        by_source = {
            "drafted": self._family(
                CounterMetricFamily, "paceline_drafted_tokens", "Candidates verified.", "source", "position"
            ),
            "accepted": self._family(
                CounterMetricFamily, "paceline_accepted_tokens", "Candidates that became output.", "source", "position"
            ),
        }
        rolled_back = self._family(
            CounterMetricFamily, "paceline_rolled_back_tokens", "Candidates verified in vain.", "source"
        )
        wasted = self._family(
            CounterMetricFamily, "paceline_wasted_tokens", "Candidates that arrived and were never verified.", "source"
        )
        for target in targets:
            labels = self._labels(target)
            sources = _sources(target)
            for name, count in _wasted(target).items():
                wasted.add_metric([*labels, name], count)
            for name, counts in sources.items():
                for kind, family in by_source.items():
                    for place, count in enumerate(counts[kind]):
                        family.add_metric([*labels, name, str(place)], count)
                rolled_back.add_metric([*labels, name], sum(counts["drafted"]) - sum(counts["accepted"]))
            drafted.add_metric(labels, sum(sum(counts["drafted"]) for counts in sources.values()))
            accepted.add_metric(labels, sum(sum(counts["accepted"]) for counts in sources.values()))
            depth = max((len(counts["accepted"]) for counts in sources.values()), default=0)
            for place in range(depth):
                total = sum(sum(counts["accepted"][place : place + 1]) for counts in sources.values())
                per_place.add_metric([*labels, str(place)], total)
        yield from (drafted, accepted, per_place, *by_source.values(), rolled_back, wasted)

    def _links(self, targets: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        told = [{**target, **_mapping(target.get("speculation"))} for target in targets]
        yield self._counter(
            "paceline_late_drafts", "Steps of a sequence that wanted a draft and had none.", told, "late"
        )
        yield self._gauge("paceline_synthetic_acceptance", "Set: text is nonsense.", told, "synthetic_acceptance")
        yield self._gauge("paceline_drafters_connected", "Draft streams up.", targets, "drafters_connected")
        traffic = self._family(
            CounterMetricFamily, "paceline_draft_link_bytes", "Bytes between target and drafters.", "direction"
        )
        warnings = self._family(
            GaugeMetricFamily, "paceline_warnings", "Things a replica warns of; /status has the words."
        )
        for target in targets:
            for direction in ("sent", "received"):
                if (count := _number(target.get(f"draft_bytes_{direction}"))) is not None:
                    traffic.add_metric([*self._labels(target), direction], count)
            if isinstance(found := target.get("warnings"), Sequence):
                warnings.add_metric(self._labels(target), len(found))
        yield from (traffic, warnings)

    def _handoff(self, replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        """A replica that left is not asked any more: what it sent is what the others received."""
        sessions = self._family(
            CounterMetricFamily, "paceline_handoff_sessions", "Sessions whose KV changed its replica.", "what"
        )
        traffic = self._family(CounterMetricFamily, "paceline_handoff_bytes", "KV that did so.", "direction")
        seconds = self._family(CounterMetricFamily, "paceline_handoff_seconds", "Time spent sending.")
        kinds = {
            **{name: (sessions, (name,)) for name in ("sent", "received", "failed", "missing")},
            **{f"bytes_{name}": (traffic, (name,)) for name in ("sent", "received")},
            "seconds": (seconds, ()),
        }
        for replica in replicas:
            for name, value in _mapping(replica.get("handoff")).items():
                if name in kinds and (count := _number(value)) is not None:
                    family, labels = kinds[name]
                    family.add_metric([*self._labels(replica), *labels], count)
        yield from (sessions, traffic, seconds)

    def _drafters(self, drafts: Sequence[ReplicaStatus]) -> Iterator[Metric]:
        yield self._counter("paceline_drafter_tokens", "Tokens a draft replica drew.", drafts, "drafted_tokens")
        yield self._counter(
            "paceline_drafter_rolled_back_tokens",
            "Tokens a draft replica drew in vain: the target went another way.",
            drafts,
            "rolled_back_tokens",
        )
        yield self._gauge("paceline_drafter_streams", "Targets connected to a draft replica.", drafts, "streams")
        yield self._gauge("paceline_drafter_sequences", "Sequences a draft replica follows.", drafts, "sequences")

    def _router(self) -> Iterator[Metric]:
        routes = CounterMetricFamily(
            "paceline_routed_requests", "Requests by why they went where they went.", labels=["model_name", "reason"]
        )
        for reason, count in sorted(self._cluster.routes.items()):
            routes.add_metric([self._model, reason], count)
        resumptions = CounterMetricFamily(
            "paceline_resumptions", "Target replicas lost in the middle of an answer.", labels=["model_name"]
        )
        resumptions.add_metric([self._model], self._cluster.resumptions)
        yield from (routes, resumptions)

    def _gauge(self, name: str, text: str, replicas: Sequence[ReplicaStatus], key: str) -> Metric:
        return self._plain(GaugeMetricFamily, name, text, replicas, key)

    def _counter(self, name: str, text: str, replicas: Sequence[ReplicaStatus], key: str) -> Metric:
        return self._plain(CounterMetricFamily, name, text, replicas, key)

    def _plain(self, kind: Any, name: str, text: str, replicas: Sequence[ReplicaStatus], key: str) -> Metric:
        family = self._family(kind, name, text)
        for replica in replicas:
            if (value := _number(replica.get(key))) is not None:
                family.add_metric(self._labels(replica), value)
        found: Metric = family
        return found

    def _family(self, kind: Any, name: str, text: str, *labels: str) -> Any:
        return kind(name, text, labels=["model_name", "replica", *labels])

    def _labels(self, replica: ReplicaStatus) -> list[str]:
        return [self._model, str(replica.get("replica_id", ""))]


def _sources(target: ReplicaStatus) -> dict[str, dict[str, list[float]]]:
    """Counts by place of each source; nothing of what is not there or not numbers."""
    found = {}
    for name, counts in _mapping(_mapping(target.get("speculation")).get("sources")).items():
        kinds = {kind: _mapping(counts).get(kind) for kind in ("drafted", "accepted")}
        if all(isinstance(each, Sequence) and all(_number(n) is not None for n in each) for each in kinds.values()):
            found[str(name)] = {kind: list(each) for kind, each in kinds.items() if each is not None}
    return found


def _wasted(target: ReplicaStatus) -> dict[str, float]:
    sources = _mapping(_mapping(target.get("speculation")).get("sources"))
    counts = {str(name): _number(_mapping(each).get("wasted")) for name, each in sources.items()}
    return {name: count for name, count in counts.items() if count is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
