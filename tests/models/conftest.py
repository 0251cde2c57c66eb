from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paceline.models import ModelFiles, Task, resolve
from tests.models.tiny_gguf import write_tiny_gguf


class Recorder:
    """A Progress that remembers each step's label and what its bytes add up to."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        self.done[label] = 0
        yield _Step(self.done, label)


class _Step:
    def __init__(self, done: dict[str, int], label: str) -> None:
        self._done, self._label = done, label

    def advance(self, n: int) -> None:
        self._done[self._label] += n


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The tiny GGUF file, really converted."""
    return resolve(str(tiny_gguf), cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip whose only index is a closed port."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
