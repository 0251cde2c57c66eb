"""Where text goes: consoles, status lines that behave in a log file, model output made safe to print."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

LOG_WIDTH = 120  # columns where standard output is no terminal, so that tables keep their shape in CI logs


def stdout() -> Console:
    """The console for results. In a pipe or a CI log it has a fixed width and no colours."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)


def note(console: Console, text: str) -> None:
    """A line beside the matter; whole where no terminal reads."""
    console.print(text, style="dim", markup=False, soft_wrap=not console.is_terminal)


def printable(text: str) -> str:
    """`text` without control characters: what a model writes must not steer the user's terminal."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


class StatusLine:
    """Says what is being waited for: a spinner on a terminal, elsewhere one line for each new state.

    Call it with the text; `clear` it before printing results. A context manager that clears at its end.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner: Status | None = None
        self._last = ""

    def __call__(self, text: str) -> None:
        if not self._console.is_terminal:
            if text != self._last:
                self._console.print(Text(text))
        elif self._spinner is None:
            self._spinner = self._console.status(Text(text))
            self._spinner.start()
        else:
            self._spinner.update(Text(text))
        self._last = text

    def clear(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
