"""Running a local cluster from the command line: models first, then replicas, and a clean end whatever happens."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paceline.cli.console import StatusLine
from paceline.config import AppSettings

if TYPE_CHECKING:
    from paceline.serving.cluster import Endpoints

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
KILL_TIMEOUT_S = 5.0


def fetch_models(settings: AppSettings, console: Console) -> None:
    """Put every model the replicas need into the cache, showing progress. Raises ModelError."""
    from paceline.cli.progress import model_progress
    from paceline.models import resolve

    with model_progress(console) as progress:
        for name in dict.fromkeys((settings.model, settings.draft_model)):
            resolve(name, progress=progress)


@contextmanager
def running_cluster(config: dict[str, Any], status: StatusLine) -> Iterator[Endpoints]:
    """Start a cluster, yield its endpoints, stop it at the end, also on Ctrl-C and SIGTERM.

    `status` shows its progress and is clear while the cluster runs.
    """
    from paceline.serving.cluster import LocalCluster

    cluster = LocalCluster(config, on_status=status)
    with status, StopSignals() as signals:
        try:
            endpoints = cluster.start()
            signals.install()  # `ray.init` has put a handler of its own in place
            status.clear()
            yield endpoints
        finally:
            signals.stopping = True
            status("stopping")
            cluster.stop()


def wait_for_interrupt() -> None:
    """Block until Ctrl-C or SIGTERM, then return."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return


class StopSignals:
    """SIGINT and SIGTERM raise KeyboardInterrupt, so that `finally` runs; once `stopping`, they force the end.

    A context manager: the handlers before it come back after it.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            kill_children()
            os._exit(128 + number)
        raise KeyboardInterrupt


def kill_children() -> None:
    """Kill every process this one has started, and theirs; returns when they are gone."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=KILL_TIMEOUT_S)
