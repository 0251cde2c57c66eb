"""helm/paceline/README.md: what a person wrote, in README.head.md, and a table of the values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from values_file import Value

HEAD = Path(__file__).parent / "README.head.md"


def readme_of(values: tuple[Value, ...]) -> str:
    return HEAD.read_text() + "\n" + "\n".join(_lines(values)) + "\n"


def _lines(values: tuple[Value, ...]) -> Iterator[str]:
    """Keys without a section of their own come first, in one table."""
    single = [value for value in values if not value.children]
    yield from _table(single)
    for section in values:
        if section.children:
            yield from ("", f"### {section.name}", "")
            yield from filter(None, [section.comment.description])
            if section.comment.like:
                yield f"Also every key of `{section.comment.like}`, which it overrides."
            yield ""
            yield from _table(list(section.leaves()))


def _table(values: list[Value]) -> Iterator[str]:
    yield from ("| Value | Default | What it does |", "|---|---|---|")
    for value in values:
        default = "see the file" if value.comment.each else f"`{json.dumps(value.default)}`"
        description = value.comment.description
        if value.comment.each:
            description += f" Keys of an entry: see `{value.comment.each}`."
        if choices := value.comment.schema.get("enum"):
            description += f" One of {', '.join(f'`{json.dumps(each)}`' for each in choices)}."
        yield f"| `{'.'.join(value.path)}` | {_cell(default)} | {_cell(description)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
