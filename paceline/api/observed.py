"""A request as it is told of: one span from its arrival to its last frame, and a line in the log if one is wanted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from paceline.errors import PacelineError, RequestTimeout
from paceline.telemetry.requests import NS, Origin, answered, asked, named, operation, together
from paceline.telemetry.tracing import Span, Tracer
from paceline.types import Accepted, Delta, Frame, Metrics, Request

logger = logging.getLogger(__name__)

CANCELLED = "cancelled"
"""Of a request whose client went away, in place of an error's code."""


class Observer:
    """Watches every request of a front end. Without a tracer and without `log_requests` there is no need of one."""

    def __init__(
        self, tracer: Tracer, model: str, *, log_requests: bool = False, within: Callable[[], str] = lambda: ""
    ) -> None:
        """`within` gives the traceparent of a server in front, in this process, that has a span of its own, or ""."""
        self._tracer, self._model, self._log, self._within = tracer, model, log_requests, within

    def begin(self, request: Request, origin: Origin, timeout_s: float) -> Observed:
        """A request is about to be opened, with so much time."""
        began = time.time_ns() if origin.arrived is None else origin.arrived
        span = self._tracer.start(
            f"{operation(request)} {self._model}",
            kind="server",
            parent=self._within() or origin.traceparent,
            began=began,
            attributes={**asked(request, self._model), "paceline.request_id": origin.request_id or None},
        )
        return Observed(request.within(span.traceparent), span, began, timeout_s, self._log)


@dataclass(slots=True)
class Observed:
    """`request` carries the trace on. Seconds are counted from `began`, the arrival."""

    request: Request
    span: Span
    began: int
    timeout_s: float
    logged: bool
    accepted: Accepted | None = None
    tokens: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    metrics: dict[int, Metrics] = field(default_factory=dict)

    async def frames(self, frames: AsyncGenerator[Frame, None]) -> AsyncGenerator[Frame, None]:
        """The frames, unchanged."""
        ends_at = asyncio.get_running_loop().time() + self.timeout_s
        error = "internal_error"
        try:
            async with aclosing(frames):
                async for frame in frames:
                    self._note(frame)
                    yield frame
            error = ""
        except PacelineError as failure:
            error = failure.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            late = asyncio.get_running_loop().time() >= ends_at
            error = RequestTimeout.code if late else CANCELLED
            raise
        finally:
            self._end("" if len(self.reasons) == self.request.params.n else error)

    def _note(self, frame: Frame) -> None:
        if isinstance(frame, Accepted):
            self.accepted = frame
        elif isinstance(frame, Delta):
            self.tokens += len(frame.token_ids)
            if frame.finish_reason is not None:
                self.reasons[frame.index] = frame.finish_reason.value
                self.metrics[frame.index] = frame.metrics or Metrics()

    def _end(self, error: str) -> None:
        ended = time.time_ns()
        metrics = together([self.metrics[index] for index in sorted(self.metrics)]) if self.metrics else Metrics()
        metrics = replace(metrics, completion_tokens=self.tokens, prompt_tokens=len(self.request.token_ids))
        reasons = [self.reasons[index] for index in sorted(self.reasons)]
        where = self.accepted
        self.span.end(
            {
                **answered(metrics, reasons),
                "paceline.replica": where.replica_id if where is not None else None,
                "paceline.route": where.route or None if where is not None else None,
                "error.type": error or None,
            },
            ended=ended,
            # A client that goes away is no fault of the server's.
            error="" if error == CANCELLED else error,
        )
        if self.logged:
            self._tell(metrics, reasons, error, (ended - self.began) / NS)

    def _tell(self, metrics: Metrics, reasons: list[str], error: str, seconds: float) -> None:
        # Serve has fields of its own: request_id, route, replica and deployment are those of whoever writes the line.
        request, where = self.request, self.accepted
        fields = {
            **named(request),
            "status": error or "ok",
            "finish_reason": ",".join(reasons) or None,
            "target": where.replica_id if where is not None else None,
            "route_reason": where.route or None if where is not None else None,
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "completion_tokens": metrics.completion_tokens,
            "drafted_tokens": metrics.drafted,
            "accepted_tokens": metrics.accepted,
            "queue_s": round(metrics.queue_s, 6),
            "ttft_s": round(metrics.ttft_s, 6),
            "total_s": round(seconds, 6),
            "resumptions": metrics.resumptions,
        }
        known = {name: value for name, value in fields.items() if value is not None}
        # A log of text has no fields: there the message says it all.
        logger.info("request ended: %s", " ".join(f"{name}={value}" for name, value in known.items()), extra=known)
