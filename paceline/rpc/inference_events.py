"""What Paceline says, as the messages of inference.proto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from paceline.api.state import ClusterStatus, ReplicaStatus, SessionInfo
from paceline.errors import PacelineError
from paceline.rpc.rich_errors import cut
from paceline.types import Accepted, Delta, Metrics, Request, TokenLogprobs
from paceline.v1 import inference_pb2 as pb

MAX_COUNT = 2**32 - 1
_COUNTS = ("running", "waiting", "kv_tokens_total", "kv_tokens_in_use", "kv_tokens_cached", "sessions")


def started_event(request: Request, accepted: Accepted, synthetic_acceptance: float | None = None) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        started=pb.Started(
            request_id=request.request_id,
            session_id=request.session_id or "",
            replica_id=accepted.replica_id,
            seed=accepted.seed,
            prompt_tokens=len(request.token_ids),
            synthetic_acceptance=synthetic_acceptance,
            route=accepted.route,
        )
    )


def delta_events(delta: Delta, counted: Metrics) -> list[pb.GenerateEvent]:
    """The tokens of one engine step, the end, or both. `counted` stands in for metrics the replica left out."""
    events = []
    if delta.token_ids or delta.text:
        tokens = pb.Tokens(
            token_ids=delta.token_ids,
            text=delta.text,
            index=delta.index,
            logprobs=[_logprobs_message(entry) for entry in delta.logprobs],
            prompt_logprobs=[_logprobs_message(entry) for entry in delta.prompt_logprobs],
            verified=None if delta.verified is None else pb.Verified(**asdict(delta.verified)),
        )
        events.append(pb.GenerateEvent(tokens=tokens))
    if delta.finish_reason is not None:
        usage = usage_message(delta.metrics or counted)
        reason = f"FINISH_REASON_{delta.finish_reason.name}"
        finished = pb.Finished(reason=reason, usage=usage, index=delta.index)
        events.append(pb.GenerateEvent(finished=finished))
    return events


def _logprobs_message(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def usage_message(metrics: Metrics) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=metrics.prompt_tokens,
        cached_tokens=metrics.cached_tokens,
        completion_tokens=metrics.completion_tokens,
        drafted_tokens=metrics.drafted,
        accepted_tokens=metrics.accepted,
        late_drafts=metrics.late,
        steps=metrics.steps,
        queue_seconds=metrics.queue_s,
        ttft_seconds=metrics.ttft_s,
        total_seconds=metrics.total_s,
        wasted_drafts=metrics.wasted,
        resumptions=metrics.resumptions,
        sources=[
            pb.SourceUsage(source=each.source, drafted=each.drafted, accepted=each.accepted, wasted=each.wasted)
            for each in metrics.sources
        ],
    )


def session_message(session: SessionInfo) -> pb.Session:
    told = {name: value for name, value in asdict(session).items() if value is not None}
    return pb.Session(**told)


def failed_event(error: PacelineError) -> pb.GenerateEvent:
    """Sent before the status, and the same: the status of a stream travels with an event through Ray Serve's proxy."""
    failed = pb.Failed(
        code=error.code, message=cut(error.message), param=error.param or "", retry_after_seconds=error.retry_after
    )
    return pb.GenerateEvent(failed=failed)


def status_message(model: str, max_model_len: int, cluster: ClusterStatus) -> pb.StatusResponse:
    """What the replicas say. Any of it may be missing or of another kind: a replica may be of another version."""
    return pb.StatusResponse(
        model=model,
        max_model_len=max_model_len,
        targets=[_target_message(replica) for replica in cluster.targets],
        drafts=[
            pb.DraftStatus(replica_id=str(replica.get("replica_id", "")), details=_struct(replica))
            for replica in cluster.drafts
        ],
        router=pb.RouterStatus(routes=dict(cluster.routes), resumptions=cluster.resumptions),
        autoscaling=_struct(cluster.autoscaling),
    )


def _target_message(replica: ReplicaStatus) -> pb.TargetStatus:
    speculation = _mapping(replica.get("speculation"))
    return pb.TargetStatus(
        replica_id=str(replica.get("replica_id", "")),
        **{name: _count(replica.get(name)) for name in _COUNTS},
        drafters_connected=_count(replica.get("drafters_connected")),
        sources=[
            pb.SourceCounts(
                source=name,
                drafted=_counts(_mapping(counts).get("drafted")),
                accepted=_counts(_mapping(counts).get("accepted")),
                wasted=_count(_mapping(counts).get("wasted")),
            )
            for name, counts in _mapping(speculation.get("sources")).items()
        ],
        late_drafts=_count(speculation.get("late")),
        warnings=[str(each) for each in _list(replica.get("warnings"))],
        details=_struct(replica),
    )


def _struct(mapping: Mapping[str, Any]) -> Struct:
    return Struct(fields={str(name): _value(value) for name, value in mapping.items()})


def _value(value: Any) -> Value:
    """As JSON would have it; what JSON does not know becomes its text."""
    if value is None:
        return Value(null_value=0)  # type: ignore[arg-type]  # the enum's only value
    if isinstance(value, bool):
        return Value(bool_value=value)
    if isinstance(value, int | float):
        return Value(number_value=value)
    if isinstance(value, Mapping):
        return Value(struct_value=_struct(value))
    if isinstance(value, list | tuple):
        return Value(list_value=ListValue(values=[_value(each) for each in value]))
    return Value(string_value=str(value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _count(value: Any) -> int:
    return min(max(0, value), MAX_COUNT) if isinstance(value, int) else 0


def _counts(value: Any) -> list[int]:
    return [_count(each) for each in _list(value)]
