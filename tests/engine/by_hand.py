"""Background threads that do nothing by themselves, so that tests decide what happened when."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers

T = TypeVar("T")
PLENTY = 2**40


class Worker:
    """Does its jobs when it is told to."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

        self._jobs.append(run)
        return future

    def stop(self, timeout_s: float) -> bool:
        self.work()
        return True

    def work(self, jobs: int = 10_000) -> None:
        for _ in range(min(jobs, len(self._jobs))):
            self._jobs.popleft()()


class Tiers(KVTiers):
    """Real files, threads by hand."""

    def __init__(
        self,
        slabs: Slabs,
        host_bytes: int = PLENTY,
        folder: Path | None = None,
        *,
        disk_bytes: int = PLENTY,
        quantized: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
        ttl_s: float = float("inf"),
    ) -> None:
        self.reader, self.writer = Worker(), Worker()
        files = KVFiles(folder, "a model", disk_bytes, ttl_s, clock) if folder is not None else None
        super().__init__(
            slabs,
            host_bytes,
            files,
            quantized=quantized,
            ttl_s=ttl_s,
            clock=clock,
            reader=self.reader,
            writer=self.writer,
        )

    def work(self) -> None:
        self.writer.work()
        self.reader.work()
