"""What an answer cost, in words: shared by `chat` and `demo`."""

from __future__ import annotations

from paceline.cli.client import Answer
from paceline.speculation.telemetry import merged
from paceline.types import Metrics


def stats_line(answer: Answer) -> str:
    """One line: who served it, what came from the KV cache, how fast, what the drafters contributed."""
    metrics = answer.metrics
    return " · ".join(
        (
            f"target {answer.replica_id}",
            f"{metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens cached",
            f"{metrics.completion_tokens} tokens",
            f"first after {metrics.ttft_s:.2f} s",
            f"{metrics.decode_tokens_per_s:.1f} tok/s",
            drafts_in_words(metrics),
            f"seed {answer.seed}",
        )
    )


def drafts_in_words(metrics: Metrics) -> str:
    late = f", {metrics.late} late" if metrics.late else ""
    return f"{metrics.accepted} of {metrics.drafted} drafted accepted{late}" if metrics.drafted else f"no drafts{late}"


def total(parts: list[Metrics]) -> Metrics:
    """The sum of several answers."""
    return Metrics(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        drafted=sum(part.drafted for part in parts),
        accepted=sum(part.accepted for part in parts),
        late=sum(part.late for part in parts),
        steps=sum(part.steps for part in parts),
        ttft_s=sum(part.ttft_s for part in parts),
        total_s=sum(part.total_s for part in parts),
        wasted=sum(part.wasted for part in parts),
        sources=merged(part.sources for part in parts),
    )
