"""What an answer costs, in words: shared by `chat` and `demo`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from paceline.cli.client import Answer, Step
from paceline.speculation.telemetry import summed
from paceline.types import Metrics, SourceMetrics

if TYPE_CHECKING:
    from rich.table import Table


class Meter:
    """Tokens a second and acceptance of an answer that is still coming, as this side of the wire sees it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first = self._last = 0.0
        self._tokens = self._steps = self._drafted = self._accepted = 0

    def note(self, step: Step) -> None:
        self._last = self._clock()
        self._first = self._first if self._steps else self._last
        self._steps += 1
        self._tokens += step.tokens
        self._drafted += step.drafted
        self._accepted += step.accepted

    def line(self) -> str:
        """One line; a dot each until there is something to tell."""
        if not self._tokens:
            return "…"
        parts = [f"{self._tokens} tokens"]
        if self._last > self._first:
            parts.append(f"{(self._tokens - 1) / (self._last - self._first):.1f} tok/s")
        if self._drafted:
            parts.append(f"{100 * self._accepted / self._drafted:.0f}% of candidates accepted")
            parts.append(f"{self._tokens / self._steps:.1f} tokens a step")
        return " · ".join(parts)


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


def summary_line(answers: Sequence[Answer]) -> str:
    """Several answers of a conversation in one line."""
    metrics = summed([answer.metrics for answer in answers])
    times = sorted(answer.metrics.ttft_s for answer in answers)
    replicas = ", ".join(dict.fromkeys(answer.replica_id for answer in answers))
    decode_s = metrics.total_s - metrics.ttft_s
    rate = (metrics.completion_tokens - len(answers)) / decode_s if decode_s > 0 else 0.0
    return " · ".join(
        (
            f"{several(len(answers), 'answer')} by {replicas}",
            f"{metrics.completion_tokens} tokens",
            f"{rate:.1f} tok/s",
            f"first after {times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s at most",
            f"{metrics.cached_tokens} of {metrics.prompt_tokens} prompt tokens cached",
            drafts_in_words(metrics),
        )
    )


def source_table(sources: Sequence[SourceMetrics]) -> Table | None:
    """A row for each source of candidates, with its acceptance by place in the run; None if there are none."""
    from rich import box
    from rich.table import Table

    if not sources:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source")
    for heading in ("drafted", "accepted", "rolled back", "wasted", "acceptance", "by place in the run"):
        table.add_column(heading, justify="right", overflow="fold")
    for each in sources:
        drafted, accepted = sum(each.drafted), sum(each.accepted)
        places = " ".join(percent(a, d) for a, d in zip(each.accepted, each.drafted, strict=True))
        counts = (str(drafted), str(accepted), str(each.rolled_back), str(each.wasted), percent(accepted, drafted))
        table.add_row(each.source.replace("_", " "), *counts, places)
    return table


def several(number: int, thing: str) -> str:
    """`3 turns`, `1 turn`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
