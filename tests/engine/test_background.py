"""The thread for what the engine must not wait for."""

from __future__ import annotations

import threading

import pytest

from paceline.engine.background import BackgroundThread

PATIENCE_S = 60.0


def test_jobs_are_done_in_their_order() -> None:
    thread, done = BackgroundThread("t"), []
    for n in range(5):
        future = thread.submit(lambda n=n: done.append(n))  # type: ignore[misc]
    future.result(PATIENCE_S)
    assert done == [0, 1, 2, 3, 4]


def test_a_job_that_fails_ends_no_other() -> None:
    thread = BackgroundThread("t")
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result(PATIENCE_S)
    assert thread.submit(lambda: 5).result(PATIENCE_S) == 5


def test_a_stop_waits_for_what_is_queued_as_long_as_it_may() -> None:
    thread, gate = BackgroundThread("t"), threading.Event()
    future = thread.submit(lambda: gate.wait(PATIENCE_S))
    assert not thread.stop(0.01)
    gate.set()
    assert thread.stop(PATIENCE_S)
    assert future.result(0)


def test_a_chore_is_done_again_and_again_beside_the_jobs() -> None:
    rounds = threading.Semaphore(0)
    thread = BackgroundThread("t", lambda: rounds.release(), every_s=0.001)
    assert all(rounds.acquire(timeout=PATIENCE_S) for _ in range(3))
    assert thread.submit(lambda: 5).result(PATIENCE_S) == 5
    thread.stop(PATIENCE_S)
