"""What the user types, and what Tab makes of it."""

from __future__ import annotations

from paceline.cli.prompt import completer, read_message


def typed(*lines: str) -> str:
    keys = iter(lines)
    return read_message(lambda _: next(keys), "> ")


def test_a_line_is_a_message() -> None:
    assert typed("  hello ") == "hello"


def test_a_line_that_ends_with_a_backslash_goes_on() -> None:
    assert typed("one\\", "two\\", "three") == "one\ntwo\nthree"


def test_quotes_hold_several_lines_as_they_are() -> None:
    assert typed('"""first', "  indented\\", "", 'last"""') == "first\n  indented\\\n\nlast"


def test_quotes_may_close_on_their_own_line() -> None:
    assert typed('"""', "text", '"""') == "text"


def test_later_lines_have_another_prompt() -> None:
    prompts: list[str] = []
    lines = iter(["a\\", "b"])
    read_message(lambda prompt: (prompts.append(prompt), next(lines))[1], "> ")
    assert prompts == ["> ", ". "]


def completions(line: str) -> list[str]:
    word = line.rpartition(" ")[2]
    complete = completer(["/session", "/stats", "/save"], lambda: ["trip", "tree"], lambda: line)
    found = []
    while (each := complete(word, len(found))) is not None:
        found.append(each)
    return found


def test_commands_are_completed() -> None:
    assert completions("/s") == ["/session ", "/stats ", "/save "]
    assert completions("/st") == ["/stats "]


def test_sessions_are_completed_behind_their_command() -> None:
    assert completions("/session t") == ["trip ", "tree "]
    assert completions("/session ") == ["trip ", "tree "]


def test_nothing_else_is() -> None:
    assert (completions("hello s"), completions(""), completions("/stats t")) == ([], [], [])
