"""Threads that own a device: one runs the engine, one the drafter; everyone else leaves messages."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from paceline.engine.background import BackgroundThread
from paceline.engine.draft_streams import DraftStreams
from paceline.engine.drafter import Drafter
from paceline.engine.engine import Engine
from paceline.engine.kv_cache import KVCache
from paceline.engine.meters import DrafterMeter
from paceline.errors import EngineError, InvalidRequest, PacelineError, Unavailable
from paceline.speculation.frames import Candidates, DraftFrame
from paceline.speculation.grammar import Grammars
from paceline.speculation.telemetry import DraftedSequence
from paceline.types import Delta, Failure, FinishReason, Grammar, Request, choice_ids

logger = logging.getLogger(__name__)

T = TypeVar("T")
Sink = Callable[[Delta | Failure], object]
"""Called in the engine's thread with each thing that happens to one request; must not block. If it raises,
nobody listens any more: the request is aborted."""
DraftSink = Callable[[list[Candidates]], object]
"""Called in the drafter's thread with what became ready for one stream, maybe nothing; must not block. If it raises,
nobody listens any more: the stream is disconnected."""


class DeviceThread:
    """Calls `step` while `has_work`, sleeps otherwise, and runs what others hand it between two steps.

    A step that raises ends the thread: `on_end` hears an error that says so and no more, the log has the
    rest, and the thread is unhealthy from then on. `on_end` may be called twice, the second time by `abandon`.
    """

    def __init__(
        self,
        name: str,
        has_work: Callable[[], bool],
        step: Callable[[], None],
        on_end: Callable[[PacelineError], None],
    ) -> None:
        self._has_work, self._step, self._on_end = has_work, step, on_end
        self._inbox: deque[Callable[[PacelineError | None], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._abandoned

    @property
    def ended(self) -> bool:
        """Whether what it owned may be touched by others. Of an abandoned one nobody knows."""
        return not self._thread.is_alive() and not self._abandoned

    def call(self, function: Callable[[], T], future: Future[T] | None = None) -> Future[T]:
        """Run a function in this thread, between two steps; its result goes into the `future`, if one is given."""
        future = Future() if future is None else future

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
            if not self._stopping:
                self._inbox.append(run)
                self._wake.notify()
                return future
        run(Unavailable("the replica has stopped"))
        return future

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step it is in; do not wait for an abandoned one. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread and not self._abandoned:
            self._thread.join(timeout_s)

    def abandon(self, error: PacelineError) -> None:
        """Called by another thread when the step this one is in may never end: nobody waits for it any longer.

        What waits in the inbox and whatever comes is refused. Idempotent.
        """
        with self._wake:
            self._stopping = self._abandoned = True
            self._wake.notify()
        self._on_end(error)
        self._drain_inbox(refusal=error)

    def _run(self) -> None:
        end: PacelineError = Unavailable("the replica is shutting down")
        try:
            while self._wait_for_work():
                self._drain_inbox()
                if self._has_work():
                    self._step()
        except BaseException:
            logger.exception("a step failed")
            end = EngineError("the engine failed while serving this request")
        with self._wake:
            self._stopping = True
        try:
            self._on_end(end)
        finally:
            self._drain_inbox(refusal=end)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self._has_work()):
                self._wake.wait()
            return not self._stopping

    def _drain_inbox(self, refusal: PacelineError | None = None) -> None:
        while (run := self._next()) is not None:
            run(refusal)

    def _next(self) -> Callable[[PacelineError | None], None] | None:
        try:
            return self._inbox.popleft()
        except IndexError:
            return None


class _Compiling:
    """Compiles grammars in a thread of its own, where no running sequence waits for it: up to a second each."""

    def __init__(self, grammars: Grammars | None, device: DeviceThread) -> None:
        self._grammars, self._device = grammars, device
        self._worker = BackgroundThread("grammars")

    def before(self, function: Callable[[], T], wanted: Sequence[Grammar]) -> Future[T]:
        """Run a function in the device's thread once these are compiled. What is wrong with them it finds itself."""
        grammars = self._grammars
        if grammars is None or all(grammars.knows(grammar) for grammar in wanted):
            return self._device.call(function)
        future: Future[T] = Future()

        def compile_all() -> None:
            for grammar in wanted:
                with contextlib.suppress(InvalidRequest):
                    grammars.compile(grammar)
            self._device.call(function, future)

        self._worker.submit(compile_all)
        return future


class EngineLoop:
    """An engine in its thread: submit, abort, ask."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sinks: dict[str, Sink] = {}
        self._thread = DeviceThread("engine", lambda: engine.has_work, self._step, self._fail_all)
        self._compiling = _Compiling(engine.grammars, self._thread)
        self.call = self._thread.call

    @property
    def healthy(self) -> bool:
        return self._thread.healthy

    @property
    def kv(self) -> KVCache:
        """To be touched in the thread alone."""
        return self.engine.kv

    def submit(self, request: Request, sink: Sink) -> Future[None]:
        """Hand over a request, all its outputs. The future resolves once it is queued, or raises the refusal."""
        choices = request.choices()

        def add() -> None:
            self.engine.add_all(choices)
            self._sinks.update((choice.request_id, sink) for choice in choices)

        grammar = request.params.grammar
        return self._compiling.before(add, [grammar] if grammar is not None else [])

    def abort(self, request_id: str, n: int = 1) -> Future[None]:
        """End a request and its n outputs; its sink hears no more."""

        def drop() -> None:
            for name in choice_ids(request_id, n):
                self._drop(name)

        return self.call(drop)

    def end(self, request_id: str, n: int = 1) -> Future[bool]:
        """End a request and its n outputs; its sink hears of each that had not ended that it was aborted. Whether there
        was one."""

        def tell() -> bool:
            sinks = {index: self._sinks.get(name) for index, name in enumerate(choice_ids(request_id, n))}
            for name in choice_ids(request_id, n):
                self._drop(name)
            running = {index: sink for index, sink in sinks.items() if sink is not None}
            for index, sink in running.items():
                _told(sink, Delta((), "", FinishReason.ABORT, index=index))
            return bool(running)

        return self.call(tell)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End every request with an error, then the thread; then idle sessions go to the disk tier. Idempotent."""
        self._thread.stop(timeout_s)
        if self._thread.ended:
            self.engine.close(timeout_s)

    def abandon(self, error: PacelineError) -> None:
        """End every request with this error at once, although a step may be stuck; refuse all others from now on."""
        self._thread.abandon(error)

    def _step(self) -> None:
        for request_id, delta in self.engine.step().items():
            sink = self._sinks.pop(request_id, None) if delta.finished else self._sinks.get(request_id)
            if sink is not None and not _told(sink, delta):
                self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._sinks.pop(request_id, None)
        self.engine.abort(request_id)

    def _fail_all(self, error: PacelineError) -> None:
        for name in list(self._sinks):
            if (sink := self._sinks.pop(name, None)) is not None:
                _told(sink, Failure.of(error))


class DrafterLoop:
    """A drafter in its thread, serving the streams of several targets."""

    def __init__(self, drafter: Drafter, on_close: Callable[[DraftedSequence], object] | None = None) -> None:
        """`on_close` hears, in the drafter's thread, of every traced sequence that ended; it must not block."""
        self.drafter = drafter
        self.meter = DrafterMeter(drafter)
        drafter.on_close = on_close
        self._streams = DraftStreams(drafter)
        self._sinks: dict[str, DraftSink] = {}
        self._thread = DeviceThread("drafter", lambda: drafter.has_work, self._timed, lambda _: self._sinks.clear())
        self._compiling = _Compiling(drafter.grammars, self._thread)
        self.call = self._thread.call

    @property
    def healthy(self) -> bool:
        return self._thread.healthy

    @property
    def kv(self) -> KVCache:
        """To be touched in the thread alone."""
        return self.drafter.kv

    def connect(self, stream: str, sink: DraftSink) -> Future[None]:
        """A target's stream begins."""

        def add() -> None:
            self._streams.connect(stream)
            self._sinks[stream] = sink

        return self.call(add)

    def apply(self, stream: str, frame: DraftFrame) -> Future[None]:
        """What one target says after one of its steps. The next one may be applied when the future is done."""
        grammars = [opened.params.grammar for opened in frame.opens if opened.params.grammar is not None]
        return self._compiling.before(lambda: self._streams.apply(stream, frame), grammars)

    def disconnect(self, stream: str) -> Future[None]:
        """A target's stream ended, however: forget its sequences, keep their KV as cache."""
        return self.call(lambda: self._drop(stream))

    def stop(self, timeout_s: float = 10.0) -> None:
        self._thread.stop(timeout_s)

    def abandon(self, error: PacelineError) -> None:
        """Forget every stream at once, although a step may be stuck; refuse whatever comes from now on."""
        self._thread.abandon(error)

    def _timed(self) -> None:
        self.meter.time(self._step)

    def _step(self) -> None:
        for stream, ready in self._streams.step().items():
            if (sink := self._sinks.get(stream)) is not None and not _told(sink, ready):
                self._drop(stream)

    def _drop(self, stream: str) -> None:
        self._sinks.pop(stream, None)
        self._streams.disconnect(stream)


def _told(sink: Callable[[T], object], message: T) -> bool:
    """Whether the sink took it. One that raises must not end the thread that serves all others."""
    try:
        sink(message)
    except Exception:
        logger.exception("a listener failed and is dropped")
        return False
    return True
