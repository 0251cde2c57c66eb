"""The engine's thread: it alone touches the device; everyone else leaves messages."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from paceline.engine.engine import Engine
from paceline.errors import EngineError, PacelineError, Unavailable
from paceline.types import Delta, Failure, Request

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sink = Callable[[Delta | Failure], None]
"""Called in the engine's thread with each thing that happens to one request; must not block."""


class EngineLoop:
    """Runs `engine.step()` while there is work and sleeps otherwise.

    A step that raises fails every request it had, with a message that says so and no more; the error is
    logged and the loop is unhealthy from then on.
    """

    def __init__(self, engine: Engine, name: str = "engine") -> None:
        self._engine = engine
        self._sinks: dict[str, Sink] = {}
        self._inbox: deque[Callable[[PacelineError | None], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._error is None and self._thread.is_alive()

    def submit(self, request: Request, sink: Sink) -> Future[None]:
        """Hand over a request. The future resolves once it is queued, or raises why it was refused."""

        def add() -> None:
            self._engine.add(request)
            self._sinks[request.request_id] = sink

        return self.call(add)

    def abort(self, request_id: str) -> None:
        """End a request; its sink hears no more."""

        def drop() -> None:
            self._sinks.pop(request_id, None)
            self._engine.abort(request_id)

        if not self._stopping:
            self.call(drop)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run(refusal: PacelineError | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if refusal is not None:
                    raise refusal
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping or self._error is not None:
                future.set_exception(Unavailable("the engine has stopped"))
                return future
            self._inbox.append(run)
            self._wake.notify()
        return future

    def stop(self, timeout_s: float = 10.0) -> None:
        """End every request with an error, then the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drain_inbox()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine's step failed")
            self._error = error
            self._fail_all(EngineError("the engine failed while serving this request"))
        else:
            self._fail_all(Unavailable("the replica is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self._engine.has_work):
                self._wake.wait()
            return not self._stopping

    def _drain_inbox(self, refusal: PacelineError | None = None) -> None:
        while self._inbox:
            self._inbox.popleft()(refusal)

    def _deliver(self, deltas: dict[str, Delta]) -> None:
        for request_id, delta in deltas.items():
            sink = self._sinks.get(request_id)
            if delta.finished:
                self._sinks.pop(request_id, None)
            if sink is not None:
                sink(delta)

    def _fail_all(self, error: PacelineError) -> None:
        with self._wake:
            self._stopping = True
        for sink in self._sinks.values():
            sink(Failure.of(error))
        self._sinks.clear()
        self._drain_inbox(refusal=error)
