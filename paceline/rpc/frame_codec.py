"""Frames of many requests as bytes, and back: msgpack of plain lists. Nothing that is read is ever code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

import msgpack

from paceline.types import Delta, Failure, FinishReason, Metrics, SourceMetrics, TokenLogprobs, Verified

Named = tuple[str, Delta | Failure]
"""A request's id, and what happens to it."""


def pack(frames: Iterable[Named]) -> bytes:
    packed: bytes = msgpack.packb([_delta(*each) if isinstance(each[1], Delta) else _failure(*each) for each in frames])
    return packed


def unpack(data: bytes) -> list[Named]:
    return [(entry[0], _frame(entry)) for entry in msgpack.unpackb(data, use_list=False)]


def _delta(name: str, delta: Any) -> list[Any]:
    """Most have tokens and a text and nothing else."""
    entry: list[Any] = [name, delta.index, delta.token_ids, delta.text]
    if delta.finish_reason is None and not delta.logprobs and not delta.prompt_logprobs and delta.verified is None:
        return entry
    reason, metrics = delta.finish_reason, delta.metrics
    entry += [
        None if reason is None else reason.value,
        None if metrics is None else _metrics(metrics),
        [_logprobs(each) for each in delta.logprobs],
        [_logprobs(each) for each in delta.prompt_logprobs],
        None if delta.verified is None else astuple(delta.verified),
    ]
    return entry


def _failure(name: str, failure: Any) -> list[Any]:
    return [name, -1, failure.code, failure.message, failure.param, failure.retry_after, failure.replica_id]


def _metrics(metrics: Metrics) -> list[Any]:
    return [
        [getattr(metrics, name) for name in _COUNTS],
        [[each.source, each.drafted, each.accepted, each.wasted] for each in metrics.sources],
    ]


_COUNTS = tuple(name for name in Metrics.__slots__ if name != "sources")


def _logprobs(entry: TokenLogprobs) -> list[Any]:
    return [entry.token_id, entry.logprob, entry.rank, entry.top]


def _frame(entry: tuple[Any, ...]) -> Delta | Failure:
    if entry[1] < 0:
        return Failure(*entry[2:])
    if len(entry) == 4:
        return Delta(entry[2], entry[3], index=entry[1])
    _, index, token_ids, text, reason, metrics, logprobs, prompt, verified = entry
    return Delta(
        token_ids,
        text,
        None if reason is None else FinishReason(reason),
        None if metrics is None else _metrics_from(*metrics),
        index,
        tuple(TokenLogprobs(*each) for each in logprobs),
        tuple(TokenLogprobs(*each) for each in prompt),
        None if verified is None else Verified(*verified),
    )


def _metrics_from(counts: tuple[Any, ...], sources: tuple[tuple[Any, ...], ...]) -> Metrics:
    told: dict[str, Any] = dict(zip(_COUNTS, counts, strict=True))
    return Metrics(**told, sources=tuple(SourceMetrics(*each) for each in sources))
