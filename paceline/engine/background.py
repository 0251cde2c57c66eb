"""A thread for what the engine must not wait for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Worker(Protocol):
    """Does jobs one after the other."""

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job. What it returns or raises is in the future."""

    def stop(self, timeout_s: float) -> bool:
        """Finish what is queued, for so long at most. Whether all of it is done."""


class BackgroundThread:
    """A daemon, so that a disk that hangs keeps no process alive; after `idle_s` without a job it calls `on_idle`."""

    def __init__(self, name: str, idle_s: float | None = None, on_idle: Callable[[], None] = lambda: None) -> None:
        self._idle_s, self._on_idle = idle_s, on_idle
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(job())
            except BaseException as error:
                logger.exception("%s: a job failed", self._thread.name)
                future.set_exception(error)

        self._jobs.put(run)
        return future

    def stop(self, timeout_s: float) -> bool:
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_s)
            except queue.Empty:
                job = self._idle
            if job is None:
                return
            job()

    def _idle(self) -> None:
        try:
            self._on_idle()
        except Exception:
            logger.exception("%s: tidying failed", self._thread.name)
