"""One server process for all clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.clients.server"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address, "the server did not start"
            yield address
        finally:
            server.terminate()
