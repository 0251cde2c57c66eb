"""What an answer looks like while it comes, and when it is there."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from paceline.cli.client import Step
from paceline.cli.stats import Meter
from paceline.cli.streaming import MarkdownDisplay, PlainDisplay, Tail, display_for, finished, markdown

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 60, height: int = 20) -> Console:
    return Console(file=StringIO(), force_terminal=True, width=width, height=height, legacy_windows=False)


def written(console: Console) -> str:
    """What a console was given, without escape sequences."""
    assert isinstance(console.file, StringIO)
    return ESCAPES.sub("", console.file.getvalue())


def rendered(text: str) -> str:
    console = Console(file=StringIO(), width=60)
    console.print(markdown(text))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("a paragraph", ""),
        ("a paragraph\nits next line", ""),
        ("a paragraph\n\n", ""),
        ("a paragraph\n\nnext", "a paragraph\n\n"),
        ("- item\n\n  of the same item", ""),
        ("# Heading", ""),
        ("# Heading\ntext", "# Heading\n"),
        ("```py\nx = 1\n\ny", ""),
        ("```py\nx = 1\n```", ""),
        ("```py\nx = 1\n```\n", "```py\nx = 1\n```\n"),
        ("````\n```\n````\nafter", "````\n```\n````\n"),
    ],
)
def test_a_block_is_whole_when_nothing_can_change_it(text: str, whole: str) -> None:
    assert text[: finished(text)] == whole


def test_blocks_come_out_as_if_written_at_once() -> None:
    answer = "# Title\nfirst *words*\n\n1. one\n\n2. two\n\n```\ncode\n```\n\nlast"
    console = terminal()
    with MarkdownDisplay(console) as display:
        for character in answer:
            display.text(character)
    lines = [line.strip() for line in written(console).splitlines() if line.strip()]
    assert [line for line in lines if line != "…"] == ["Title", "first words", "1 one", "2 two", "code", "last"]


def test_one_empty_line_is_between_blocks_and_none_between_items() -> None:
    console = terminal()
    with MarkdownDisplay(console) as display:
        display.text("text\n\n- one\n\n- two\n\n```\ncode\n```\n")
    lines = [line.strip() for line in written(console).replace("…\r", "").split("\n")]
    assert lines[:6] == ["text", "", "• one", "• two", "", "code"]


def test_an_answer_that_is_broken_off_stays_on_the_screen() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), MarkdownDisplay(console) as display:
        display.text("half an ans")
        raise KeyboardInterrupt
    assert written(console).rstrip().endswith("half an ans")


def test_html_of_a_model_is_text() -> None:
    assert "<b>bold</b> & <script>" in rendered("<b>bold</b> & <script>")


def test_a_link_shows_where_it_leads() -> None:
    console = terminal(80)
    console.print(markdown("[here](https://example.org/x)"))
    assert "https://example.org/x" in written(console)
    assert isinstance(console.file, StringIO)
    assert "\x1b]8;" not in console.file.getvalue()


def test_headings_are_not_boxed() -> None:
    assert rendered("# Title").strip() == "Title"


def test_of_a_long_block_its_end_is_drawn() -> None:
    console = terminal(height=6)
    console.print(Tail(markdown("\n".join(f"- {n}" for n in range(30))), spare=2))
    assert [line.split()[-1] for line in written(console).split("\n") if line.strip()] == ["26", "27", "28", "29"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    console = terminal()
    with MarkdownDisplay(console) as display:
        display.text("\x1b[2Jhi")
    assert "[2Jhi" in written(console)


def test_where_no_terminal_reads_text_is_plain() -> None:
    assert isinstance(display_for(Console(file=StringIO()), plain=False), PlainDisplay)
    assert isinstance(display_for(terminal(), plain=True), PlainDisplay)
    assert isinstance(display_for(terminal(), plain=False), MarkdownDisplay)


def test_the_live_line_tells_speed_and_acceptance() -> None:
    times = iter([10.0, 10.5, 11.0])
    meter = Meter(lambda: next(times))
    assert meter.line() == "…"
    for step in (Step(1), Step(4, drafted=4, accepted=3), Step(3, drafted=4, accepted=2)):
        meter.note(step)
    assert meter.line() == "8 tokens · 7.0 tok/s · 62% of candidates accepted · 2.7 tokens a step"
