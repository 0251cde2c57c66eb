"""The examples do what they say, against a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.serve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ANSWER = "The capital of France is Paris."


def output(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACELINE_PROTOS": str(ROOT / "protos")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_openai_client(server: Server) -> None:
    lines = output(sys.executable, EXAMPLES / "python" / "openai_client.py", server.endpoints.http).splitlines()
    assert lines[0] == ANSWER
    assert [line.partition(": ")[0] for line in lines[-2:]] == ["speculation True", "speculation False"]
    assert len({line.partition(": ")[2] for line in lines[-2:]}) == 1


def test_paceline_s_client(server: Server) -> None:
    lines = output(sys.executable, EXAMPLES / "python" / "paceline_client.py", server.endpoints.grpc).splitlines()
    assert lines[:2] == ["smollm2-135m on 2 replicas", ANSWER]
    assert lines[-1] == "aborted: True, finished with abort"


def test_sessions(server: Server) -> None:
    lines = output(sys.executable, EXAMPLES / "python" / "sessions.py", server.endpoints.grpc).splitlines()
    assert lines[-1].startswith("2 turns, ")


@pytest.mark.slow  # installs packages
def test_node(server: Server, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("NOT TESTED: the Node example needs node and npm")
    for name in ("chat.js", "package.json", "package-lock.json"):
        shutil.copy(EXAMPLES / "node" / name, tmp_path)
    output("npm", "ci", "--no-audit", "--no-fund", cwd=tmp_path)
    told = output("node", "chat.js", server.endpoints.grpc, cwd=tmp_path)
    assert ANSWER in told
    assert "a session of 2 turns" in told
    assert told.endswith("\naborted: true, finished with FINISH_REASON_ABORT\n")
