from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest

import paceline.models
from paceline.cli.app import main
from tests.cli.fakes import FakeCluster, FakeEndpoints, FakeServer, serving


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line as the installed script does."""

    def invoke(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return invoke


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as running:
        yield running


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were made ready; none is fetched."""
    names: list[str] = []
    monkeypatch.setattr(paceline.models, "resolve", lambda name, **_: names.append(name))
    return names


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, server: FakeServer, resolved: list[str]) -> FakeCluster:
    """A cluster whose endpoint is the scripted server."""
    fake = FakeCluster(FakeEndpoints(http=server.url))
    module = ModuleType("paceline.serving.cluster")
    module.LocalCluster = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "paceline.serving.cluster", module)
    return fake
