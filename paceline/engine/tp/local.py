"""The other ranks as processes of this host, for whoever is no Ray replica: `paceline.LLM`, benchmarks, the CLI."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict
from pathlib import Path

from paceline.config import EngineSettings
from paceline.engine.tp.follower import follow
from paceline.engine.tp.group import Meeting
from paceline.engine.tp.leader import Leader
from paceline.errors import PacelineError


def local_ranks(path: Path, settings: EngineSettings) -> Leader:
    """Start the ranks but 0 of a model in a folder. They end when the leader is closed, or its process is gone."""
    leader = Leader.open(settings)
    for rank in range(1, settings.tensor_parallel_size):
        job = {"path": str(path), "settings": settings.model_dump(), "meeting": asdict(leader.meeting), "rank": rank}
        process = subprocess.Popen(
            [sys.executable, "-m", "paceline.engine.tp.local"], stdin=subprocess.PIPE, text=True, close_fds=True
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            json.dump(job, pipe)
        threading.Thread(target=_watch, args=(weakref.ref(leader), process, rank), daemon=True).start()
    return leader


def _watch(leader: weakref.ref[Leader], process: subprocess.Popen[str], rank: int) -> None:
    """A rank that ends before it has connected says nothing."""
    code = process.wait()
    if (found := leader()) is not None:
        found.fail(rank, f"ended with exit code {code}")


def _main() -> None:
    """A rank's process: what to do comes as JSON on the standard input."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    job = json.load(sys.stdin)
    settings = EngineSettings.model_validate(job["settings"])
    try:
        follow(Path(job["path"]), settings, Meeting(**job["meeting"]), job["rank"])
    except PacelineError as error:
        print(f"rank {job['rank']}: {error.message}", file=sys.stderr)
        os._exit(1)  # threads of libraries may wait for ranks that are gone
    os._exit(0)


if __name__ == "__main__":
    _main()
