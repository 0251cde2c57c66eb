"""A real Redis of a test's own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "right"


@contextmanager
def running(command: Sequence[str], port: int, folder: Path) -> Iterator[Any]:
    """A client of the server that `command` starts, once it answers. The server is killed, as a crash would."""
    redis = pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not on PATH: apt-get install redis-server")
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, password=PASSWORD, retry=Retry(ConstantBackoff(0.05), 200)) as client:
            client.ping()
            yield client
    finally:
        server.kill()
        server.wait(10)
