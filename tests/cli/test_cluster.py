from __future__ import annotations

import signal
import subprocess
import sys
import threading

import psutil
import pytest
from rich.console import Console

from paceline.cli import cluster as running
from paceline.cli.cluster import StopSignals, fetch_models, running_cluster, wait_for_interrupt
from paceline.cli.console import StatusLine
from paceline.config import parse_settings
from paceline.errors import PacelineError, Unavailable
from tests.cli.fakes import FakeCluster

FORCED = """
import signal, subprocess
from paceline.cli.cluster import StopSignals
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
with StopSignals() as signals:
    signals.stopping = True
    signal.raise_signal(signal.SIGINT)
"""


def status() -> StatusLine:
    return StatusLine(Console(quiet=True))


def raise_signal(number: signal.Signals) -> None:
    signal.raise_signal(number)


def test_the_endpoints_are_given(cluster: FakeCluster) -> None:
    with running_cluster({}, status()) as endpoints:
        assert endpoints == cluster.endpoints


def test_the_cluster_is_stopped_at_the_end(cluster: FakeCluster) -> None:
    with running_cluster({}, status()):
        pass
    assert cluster.stopped == 1


def test_the_cluster_is_stopped_after_an_error(cluster: FakeCluster) -> None:
    with pytest.raises(PacelineError), running_cluster({}, status()):
        raise Unavailable("gone")
    assert cluster.stopped == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_cluster_is_stopped_by_a_signal_during_its_start(cluster: FakeCluster, number: signal.Signals) -> None:
    cluster.on_start = lambda: raise_signal(number)
    with pytest.raises(KeyboardInterrupt), running_cluster({}, status()):
        pass
    assert cluster.stopped == 1


def test_a_handler_that_ray_puts_in_place_is_replaced(cluster: FakeCluster) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cluster.on_start = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt), running_cluster({}, status()):
        raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handlers_come_back(cluster: FakeCluster) -> None:
    before = signal.getsignal(signal.SIGINT)
    with running_cluster({}, status()):
        pass
    assert signal.getsignal(signal.SIGINT) == before


def test_waiting_ends_with_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise_signal(signal.SIGTERM)
            raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(running.threading, "Event", Interrupted)
    with StopSignals():
        assert wait_for_interrupt() is None


@pytest.fixture(scope="module")
def forced() -> subprocess.CompletedProcess[str]:
    """A process with a child that gets a signal while it is stopping already."""
    return subprocess.run([sys.executable, "-c", FORCED], capture_output=True, text=True, timeout=60)


def test_a_second_signal_ends_at_once(forced: subprocess.CompletedProcess[str]) -> None:
    assert forced.returncode == 128 + signal.SIGINT


def test_a_second_signal_leaves_no_child(forced: subprocess.CompletedProcess[str]) -> None:
    assert not runs(int(forced.stdout))


def runs(pid: int) -> bool:
    """Whether a process is alive. One that was killed stays listed until its new parent has collected it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_model_is_made_ready_once(resolved: list[str]) -> None:
    fetch_models(parse_settings({"model": "a", "draft": {"model": "b"}}), Console(quiet=True))
    fetch_models(parse_settings({"model": "c"}), Console(quiet=True))
    assert resolved == ["a", "b", "c"]
