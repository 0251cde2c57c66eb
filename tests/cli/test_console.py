from __future__ import annotations

from io import StringIO

from rich.console import Console

from paceline.cli.console import StatusLine, printable


def shown(*texts: str, terminal: bool) -> str:
    written = StringIO()
    with StatusLine(Console(file=written, force_terminal=terminal, width=80)) as status:
        for text in texts:
            status(text)
    return written.getvalue()


def test_a_log_gets_one_line_for_each_new_state() -> None:
    assert shown("starting", "starting", "2 of 5 [ready]", terminal=False) == "starting\n2 of 5 [ready]\n"


def test_a_terminal_gets_a_spinner() -> None:
    assert "⠋\x1b[0m ready" in shown("starting", "ready", terminal=True)


def test_text_and_line_breaks_are_printable() -> None:
    assert printable("Grüße\n\t→ 日本") == "Grüße\n\t→ 日本"


def test_control_characters_are_not() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b") == "a[31mb"
