"""A thread for what the engine must not wait for."""

from __future__ import annotations

import logging
import queue
import threading
import time
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
    """A daemon, so that a disk that hangs keeps no process alive. Every `every_s` seconds it does `chore` as well."""

    def __init__(self, name: str, chore: Callable[[], None] = lambda: None, every_s: float = float("inf")) -> None:
        self._chore, self._every_s = chore, every_s
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
        due = time.monotonic() + self._every_s
        while True:
            left = due - time.monotonic()
            if left <= 0:
                self.submit(self._chore)
                due += self._every_s
                continue
            try:
                job = self._jobs.get(timeout=min(left, threading.TIMEOUT_MAX))
            except queue.Empty:
                continue
            if job is None:
                return
            job()
