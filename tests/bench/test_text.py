from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.bench.text import encode, read_text
from paceline.errors import ConfigError
from tests.bench.folders import word_tokenizer, words


def test_the_default_says_which_python_it_is_from() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert read_text().name == f"Python {version}'s language reference (pydoc_data.topics)"


def test_the_default_is_a_long_text() -> None:
    assert len(read_text().content) > 300_000


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert read_text([tmp_path / "b", tmp_path / "a"]).content == "b\n\na"


def test_a_folder_is_its_texts_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/c.rst", "a.txt", "b.md", "d.py"):
        (tmp_path / name).write_text(name)
    assert read_text([tmp_path]).content == "a.txt\n\nb.md\n\nsub/c.rst"


def test_several_files_are_named_together(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert read_text([tmp_path]).name == f"2 files of {tmp_path}"


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, lambda path: path.write_bytes(b"\xff")])
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "text"
    make(path)
    with pytest.raises(ConfigError, match=f"--text: {path}"):
        read_text([path])


def test_no_more_than_the_first_tokens_are_read() -> None:
    text = words(500)
    assert encode(word_tokenizer(), text, 20) == (word_tokenizer().encode(text)[:20], 0)


def test_long_words_are_read_until_there_are_enough() -> None:
    text = " ".join(["w5" + "x" * 60] * 50)
    assert len(encode(word_tokenizer(), text, 50)[0]) == 50


def test_a_text_shorter_than_asked_for_is_read_whole() -> None:
    assert encode(word_tokenizer(), "w7 w8", 50)[0] == [7, 8]


def test_a_beginning_of_sequence_token_is_a_prefix() -> None:
    assert encode(word_tokenizer(bos=True), "w7 w8 w9", 3) == ([1, 7, 8], 1)
