"""How long work is reported. The models package says what it does; whoever called decides how that looks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One step under way."""

    def advance(self, n: int) -> None:
        """`n` more bytes are done; negative when a server made us start over."""


class Progress(Protocol):
    """Reports steps, one after the other. Leaving the context ends the step, however it ended."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Begin a step of `total` bytes; None when its length is unknown."""


class _Silent:
    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:  # noqa: ARG002
        return nullcontext(self)

    def advance(self, n: int) -> None:
        pass


SILENT: Progress = _Silent()
"""Reports nothing: the default of a library, and what replicas use."""
