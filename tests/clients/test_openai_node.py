"""OpenAI's own Node client, unmodified. The package comes from npm, so this is not in the default run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.server import MODEL

HERE = Path(__file__).with_name("node")
NODE, NPM = shutil.which("node"), shutil.which("npm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None or NPM is None, reason="NOT RUN: needs node and npm on the path"),
]


def test_chats_calls_completions_and_responses_work(url: str, tmp_path: Path) -> None:
    assert NODE is not None
    assert NPM is not None
    shutil.copytree(HERE, tmp_path, dirs_exist_ok=True)
    subprocess.run([NPM, "ci", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, timeout=200)
    ran = subprocess.run([NODE, "client.mjs", url], cwd=tmp_path, check=True, timeout=60, stdout=subprocess.PIPE)
    found = json.loads(ran.stdout)
    assert found.pop("events") == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert found == {
        "chat": "Hello, friend!",
        "streamed": "Hello, friend!",
        "call": ["weather", {"city": "Oslo"}],
        "answered": "It rains in Oslo.",
        "completion": "hiHello",
        "response": "Hello, friend!",
        "final": "Hello, friend!",
        "refused": [400, "model"],
        "models": [MODEL],
    }
