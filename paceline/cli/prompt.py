"""Reading what the user types: line editing and completion where there are, several lines as one message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

QUOTES = '"""'


def read_message(read: Callable[[str], str], prompt: str) -> str:
    """One message: a line, lines that end with a backslash, or all between two lines of three quotes.

    Raises EOFError and KeyboardInterrupt as `read` does.
    """
    more = "." * (len(prompt) - 1) + " " if prompt else ""
    line = read(prompt)
    if line.strip().startswith(QUOTES):
        return _quoted(line.strip().removeprefix(QUOTES), lambda: read(more))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(more))
    return "\n".join(lines).strip()


def _quoted(first: str, read: Callable[[], str]) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(read())
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")


def install_completion(commands: Sequence[str], sessions: Callable[[], Sequence[str]]) -> None:
    """Give `input` line editing, history and Tab, if this Python has readline. The history ends with the process."""
    if not sys.stdin.isatty():
        return
    with suppress(ImportError):
        import readline

        readline.set_completer(completer(commands, sessions, readline.get_line_buffer))
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completer(
    commands: Sequence[str], sessions: Callable[[], Sequence[str]], line: Callable[[], str]
) -> Callable[[str, int], str | None]:
    """As readline wants it: the n-th completion of a word. Commands first in a line, sessions behind /session."""
    found: list[str] = []

    def complete(word: str, n: int) -> str | None:
        if n == 0:
            before = line()[: -len(word)] if word else line()
            known = commands if not before.strip() else sessions() if before.strip() == "/session" else ()
            found[:] = [f"{each} " for each in known if each.startswith(word) and (word or before.strip())]
        return found[n] if n < len(found) else None

    return complete
