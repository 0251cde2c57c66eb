"""What an engine counts and times since its start, for /metrics. Its own thread notes, in microseconds a step.

Where vLLM has the same metric, it means the same. A gap between tokens is that between two deltas of a request, however
many tokens the second brought: what a reader of the stream waits. The time per output token of a request is its mean
over all tokens but the first. Histograms of requests are of those that came to their end; an aborted one is counted
and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from paceline.engine.sequence import Sequence
from paceline.histogram import Histogram
from paceline.types import FinishReason


class Phase(StrEnum):
    """What a step's time goes to, in the order of `Engine.step`."""

    SCHEDULE = "schedule"
    """Admission too."""
    PROPOSE = "propose"
    FORWARD = "forward"
    """With a step that was launched ahead: launching the next, and waiting for this one."""
    SAMPLE = "sample"
    EMIT = "emit"
    """Committing too."""


class StepTimes:
    """Divides a step: what passed since the last `lap` belongs to the phase that ends now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.histograms = {phase: Histogram("phase") for phase in Phase}
        self._clock = clock
        self._began = self._last = 0.0
        self._spent = dict.fromkeys(Phase, 0.0)

    def begin(self) -> None:
        """Also in place of a step that came to nothing."""
        self._began = self._last = self._clock()
        for phase in self._spent:
            self._spent[phase] = 0.0

    def lap(self, phase: Phase) -> None:
        now = self._clock()
        self._spent[phase] += now - self._last
        self._last = now

    @property
    def elapsed(self) -> float:
        """From the step's beginning to its last lap."""
        return self._last - self._began

    def end(self) -> None:
        for phase, seconds in self._spent.items():
            self.histograms[phase].note(seconds)


class EngineTelemetry:
    """All of it, of one engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.step = StepTimes(clock)
        self.finished = dict.fromkeys(FinishReason, 0)
        self.prompt_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = 0
        """Prompt tokens that were looked for among those with KV, and found."""
        self.kv_hits = {"device": 0, "host": 0, "disk": 0}
        """The latter by where they were when their request came."""
        self.depth: dict[str, Histogram] = {}
        """Candidates in a window that was verified, by source."""
        self.step_tokens = Histogram("step_tokens")
        self.ttft, self.gap, self.per_token = (Histogram(bounds) for bounds in ("first_token", "gap", "gap"))
        self.total, self.queue, self.prefill, self.decode = (Histogram("request") for _ in range(4))
        self.request_prompt, self.request_generation = Histogram("tokens"), Histogram("tokens")

    def admitted(self, sequence: Sequence) -> None:
        """For the first time: what of its prompt has KV is known."""
        found = sequence.cached_tokens
        self.prefix_queries += sequence.prompt_length
        self.prefix_hits += found
        tier, on_device = sequence.restored or ("device", found)
        on_device = min(on_device, found)
        self.kv_hits["device"] += on_device
        self.kv_hits[tier] += found - on_device

    def verified(self, source: str, candidates: int) -> None:
        if source not in self.depth:
            self.depth[source] = Histogram("depth")
        self.depth[source].note(candidates)

    def gained(self, sequence: Sequence, tokens: int, now: float) -> None:
        """The tokens of one delta."""
        self.generation_tokens += tokens
        if sequence.last_token:
            self.gap.note(now - sequence.last_token)
        else:
            self.prompt_tokens += sequence.prompt_length
            self.ttft.note(max(0.0, sequence.first_token - sequence.arrived))
        sequence.last_token = now
        if sequence.finish_reason is not None:
            self._ended(sequence, sequence.finish_reason, now)

    def aborted(self) -> None:
        self.finished[FinishReason.ABORT] += 1

    def _ended(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        output = len(sequence.tokens) - sequence.prompt_length
        decode_s = now - sequence.first_token
        drawn = output - len(sequence.request.output)
        self.finished[reason] += 1
        self.total.note(now - sequence.arrived)
        self.queue.note(max(0.0, sequence.admitted - sequence.arrived))
        self.prefill.note(max(0.0, sequence.first_token - sequence.admitted))
        self.decode.note(decode_s)
        if drawn > 1:
            self.per_token.note(decode_s / (drawn - 1))
        self.request_prompt.note(sequence.prompt_length)
        self.request_generation.note(output)

    def numbers(self, preemptions: int = 0) -> dict[str, Any]:
        """Ready for JSON; `paceline.api.metrics` reads it. Any thread may ask."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "finished": {str(reason): count for reason, count in self.finished.items()},
            "prefix_queries": self.prefix_queries,
            "prefix_hits": self.prefix_hits,
            "kv_hits": dict(self.kv_hits),
            "preemptions": preemptions,
            "drafts": sum(each.count for each in list(self.depth.values())),
            "depth": {source: each.numbers() for source, each in list(self.depth.items())},
            "step_s": {str(phase): each.numbers() for phase, each in self.step.histograms.items()},
            "step_tokens": self.step_tokens.numbers(),
            "ttft_s": self.ttft.numbers(),
            "gap_s": self.gap.numbers(),
            "per_token_s": self.per_token.numbers(),
            "total_s": self.total.numbers(),
            "queue_s": self.queue.numbers(),
            "prefill_s": self.prefill.numbers(),
            "decode_s": self.decode.numbers(),
            "request_prompt_tokens": self.request_prompt.numbers(),
            "request_generation_tokens": self.request_generation.numbers(),
        }
