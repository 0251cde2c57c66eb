"""The other rank's process: what its loss does to a step, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from paceline import LLM, SamplingParams
from paceline.errors import EngineError
from tests import tiny
from tests.engine.tp.processes import folder_of, loaded, other_rank

PATIENCE_S = 60.0
LONG = tiny.request(tiny.prompt(20), max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"), tiny.tiny_llama())


def test_a_killed_rank_ends_the_step_long_before_the_deadline(folder: Path) -> None:
    with loaded(folder, 2, collective_timeout_s=3600) as model:
        engine = model.engine()
        engine.add(LONG)
        engine.step()
        os.kill(other_rank(model), signal.SIGKILL)
        with pytest.raises(EngineError, match="rank 1"):
            tiny.deltas(engine)


def test_a_rank_that_hangs_ends_the_step_at_the_deadline(folder: Path) -> None:
    with loaded(folder, 2, collective_timeout_s=2) as model:
        engine = model.engine()
        engine.add(LONG)
        engine.step()
        other = psutil.Process(other_rank(model))
        other.suspend()
        try:
            with pytest.raises(EngineError, match="rank 1 did not join within 2 s"):
                tiny.deltas(engine)
        finally:
            other.resume()
    other.wait(PATIENCE_S)


def test_no_process_is_left_behind(folder: Path) -> None:
    with LLM(str(folder), device="cpu", threads=1, kv_tokens=512, tensor_parallel_size=2) as llm:
        other = psutil.Process(other_rank(llm._loaded))
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))
        assert other.is_running()
    other.wait(PATIENCE_S)


@pytest.mark.slow
def test_no_process_outlives_a_killed_rank_0(folder: Path) -> None:
    """`python -m tests.engine.tp.test_lost_ranks FOLDER` is that rank 0: it says who the other is, and waits."""
    command = [sys.executable, "-m", "tests.engine.tp.test_lost_ranks", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        other = psutil.Process(int(first.stdout.readline()))
        first.kill()
    other.wait(PATIENCE_S)


def _lead(folder: Path) -> None:
    with loaded(folder, 2) as model:
        print(other_rank(model), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _lead(Path(sys.argv[1]))
