"""Texts to measure on: files and folders that are named, else prose that comes with every CPython."""

from __future__ import annotations

import pydoc_data.topics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError

SUFFIXES = (".txt", ".md", ".rst")
CHARACTERS = 8
"""Of a token, generously, so that no book is tokenized for its first pages."""


@dataclass(frozen=True, slots=True)
class Text:
    """What is read, and what people call it."""

    name: str
    content: str


def read_text(paths: Sequence[Path] = ()) -> Text:
    """The files in the order given, those of a folder (.txt, .md, .rst, at any depth) in that of their names.

    Without paths, Python's language reference. Raises ConfigError naming what cannot be read.
    """
    if not paths:
        return language_reference()
    files = [file for path in paths for file in _files(path)]
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files of {', '.join(map(str, paths))}"
    return Text(name, "\n\n".join(_read(file) for file in files))


def language_reference() -> Text:
    """The topics of `help()`, the longest first: some 460 kB of English prose with code in it."""
    chapters = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Text(f"Python {version}'s language reference (pydoc_data.topics)", "\n\n".join(chapters))


def encode(tokenizer: Any, text: str, tokens: int) -> tuple[list[int], int]:
    """At most the first `tokens` ids of a text, and how many in front are not the text's own: 1 if the tokenizer begins
    texts with a beginning-of-sequence token, as Gemma's does, else 0."""
    bos = [tokenizer.bos_token_id]
    prefix = bos if tokenizer.encode(text[:1])[:1] == bos else []
    part = CHARACTERS * tokens
    ids: list[int] = tokenizer.encode(text[:part], add_special_tokens=False, verbose=False)
    while len(ids) < tokens and part < len(text):
        part *= 2
        ids = tokenizer.encode(text[:part], add_special_tokens=False, verbose=False)
    return [*prefix, *ids][:tokens], len(prefix)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"--text: {path}: no such file or folder", param="text")
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise ConfigError(f"--text: {path}: no {', '.join(SUFFIXES)} file in this folder", param="text")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text: {file}: not readable as UTF-8 text: {error}", param="text") from None
