"""A replica's part of a request as spans: a target's generation, a drafter's sequence. Made from what was noted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from paceline.errors import EngineError, PacelineError
from paceline.speculation.telemetry import DraftedSequence
from paceline.telemetry.requests import DRAFT, GENERATE, answered, phases, together
from paceline.telemetry.tracing import Span, Tracer
from paceline.types import Delta, Failure, Metrics, Request

Heard = Callable[[Delta | Failure], object]


@dataclass(slots=True)
class Generation:
    """What a target replica does for a request: a span from here to the end of the `with` block.

    `request` carries the trace on, to the drafters.
    """

    request: Request
    _span: Span
    _outputs: dict[int, Metrics] = field(default_factory=dict)
    _reasons: dict[int, str] = field(default_factory=dict)
    _last: int = 0
    _error: str = ""

    @classmethod
    def begin(cls, tracer: Tracer, request: Request, replica_id: str) -> Self:
        span = tracer.start(
            GENERATE,
            parent=request.trace,
            attributes={
                "gen_ai.response.id": request.request_id,
                "gen_ai.conversation.id": request.session_id,
                "gen_ai.usage.input_tokens": len(request.token_ids),
                "paceline.replica": replica_id,
                "paceline.resumed_tokens": sum(len(each or ()) for each in request.resumed) or None,
            },
        )
        return cls(request.within(span.traceparent), span)

    def waited(self, began: int) -> None:
        """For keys and values of the session that were on their way from another replica."""
        self._span.child("paceline.handoff", began, time.time_ns())

    def hearing(self, sink: Heard) -> Heard:
        """The sink, and before it a note of how an output ended; in the engine's thread."""

        def tell(frame: Delta | Failure) -> None:
            if isinstance(frame, Failure) or frame.finished:
                self.note(frame)
            sink(frame)

        return tell

    def note(self, frame: Delta | Failure) -> None:
        self._last = time.time_ns()
        if isinstance(frame, Failure):
            self._error = frame.code
        elif frame.finish_reason is not None:
            self._reasons[frame.index] = frame.finish_reason.value
            if frame.metrics is not None:
                self._outputs[frame.index] = frame.metrics

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._error = error.code if isinstance(error, PacelineError) else EngineError.code
        whole = len(self._reasons) == len(self.request.choices())
        metrics = together([self._outputs[index] for index in sorted(self._outputs)]) if self._outputs else None
        if metrics is not None and whole:
            phases(self._span, metrics, self._last)
        self._span.end(
            {
                **(answered(metrics, [self._reasons[index] for index in sorted(self._reasons)]) if metrics else {}),
                "error.type": self._error or (None if whole else "cancelled"),
            },
            error=self._error,
        )


def tell_drafted(tracer: Tracer, ended: DraftedSequence, replica_id: str) -> None:
    """One span a sequence, below the target's; nothing for one that nobody traces."""
    if not ended.trace:
        return
    span = tracer.start(
        DRAFT,
        parent=ended.trace,
        began=ended.opened,
        attributes={
            "paceline.replica": replica_id,
            "paceline.history_tokens": ended.history,
            "paceline.drafted_tokens": ended.drafted,
            "paceline.rolled_back_tokens": ended.rolled_back,
        },
    )
    span.end(ended=ended.closed)
