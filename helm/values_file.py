"""Reads a values.yaml together with its comments.

PyYAML drops comments, so keys are found line by line: block style, two spaces a level, comments right above their key.
An empty line ends a comment. Lines that begin with `@schema` hold JSON schema, `@each NAME` says of a map that its
entries have the keys of the section NAME, `@like NAME` that a section has those besides its own, and `@subchart NAME`
that a section is the values of that subchart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w.-]*):(?: .*)?$")
COMMENT = re.compile(r"^ *# ?(?P<text>.*)$")


@dataclass(frozen=True)
class Comment:
    """What stands above a key."""

    description: str = ""
    schema: dict[str, Any] = field(default_factory=dict)
    each: str | None = None
    like: str | None = None
    subchart: str | None = None


@dataclass(frozen=True)
class Value:
    """A key of the file: its path, its default and its comment; `children` are keys of a section, in order."""

    path: tuple[str, ...]
    default: Any
    comment: Comment
    children: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        return self.path[-1]

    def leaves(self) -> Iterator[Value]:
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


def read(path: Path) -> tuple[Value, ...]:
    """Top-level keys. Raises ValueError for a key without a description."""
    text = path.read_text()
    comments = dict(_comments(text))
    return _values(yaml.safe_load(text), comments, ())


def _values(
    section: dict[str, Any], comments: dict[tuple[str, ...], Comment], at: tuple[str, ...]
) -> tuple[Value, ...]:
    found = []
    for key, default in section.items():
        path = (*at, key)
        comment = comments[path]
        # The entries of a map are data: the section that `@each` names describes them.
        nested = isinstance(default, dict) and default and not comment.each and (*path, next(iter(default))) in comments
        children = _values(default, comments, path) if nested else ()
        if not children and not comment.description:
            raise ValueError(f"values.yaml: {'.'.join(path)} has no comment")
        found.append(Value(path, default, comment, children))
    return tuple(found)


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], Comment]]:
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if comment := COMMENT.match(line):
            above.append(comment["text"])
            continue
        if key := KEY.match(line):
            depth = len(key["indent"]) // 2
            path = [*path[:depth], key["key"]]
            yield tuple(path), _comment(above)
        above = []


def _comment(lines: list[str]) -> Comment:
    words: list[str] = []
    schema: dict[str, Any] = {}
    marks: dict[str, str] = {}
    for line in lines:
        mark, _, rest = line.partition(" ")
        if mark == "@schema":
            schema |= json.loads(rest)
        elif mark in ("@each", "@like", "@subchart"):
            marks[mark[1:]] = rest
        else:
            words.append(line.strip())
    return Comment(" ".join(words).strip(), schema, **marks)
