"""Text that grows token by token is the text decoded at once, and ends before a stop string wherever tokens end."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paceline.engine.detokenizer import MAX_HELD_TOKENS, Detokenizer

TEXTS = [
    "Hello, world! The quick brown fox.",
    "“Schöne Grüße” — naïve café, señor: 5 € ≠ 6 £",
    "日本語のテキストと中文字符，한국어",
    "👍🏽 family: 👨‍👩‍👧‍👦, flags: 🇩🇪🇯🇵, math: 𝔘𝔫𝔦",
    "a\u0301 combining, \u200bzero width, \ufeffmark, � itself",
    "tabs\tand\n\nnewlines\r\n    indented",
]
SPECIAL = "<|end|>"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the above until tokens end inside characters."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL)


def byte(value: int) -> int:
    """The token of one byte."""
    token: int = tokenizer().convert_tokens_to_ids(bytes_to_unicode()[value])
    return token


def pieces(tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What `push` says for each token, until it stopped, and then what `finish` says."""
    detokenizer = Detokenizer(tokenizer(), stop)
    found = []
    for token in tokens:
        found.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*found, detokenizer.finish()]


def decoded(tokens: list[int]) -> str:
    return tokenizer().decode(tokens, skip_special_tokens=True)


def letters(text: str) -> list[int]:
    """One token a byte."""
    return [byte(value) for value in text.encode()]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_text(text: str) -> None:
    assert "".join(pieces(tokenizer().encode(text))) == text


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_of_single_bytes_are_the_text(text: str) -> None:
    assert "".join(pieces(letters(text))) == text


def test_the_tokenizer_cuts_inside_characters() -> None:
    """Otherwise the tests above would show little."""
    found = tokenizer().encode(TEXTS[3])
    assert any(decoded([token]).endswith("\ufffd") for token in found)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(letters("a€b")) == ["a", "", "", "€", "b", ""]


def test_special_tokens_give_no_text() -> None:
    end = tokenizer().eos_token_id
    assert pieces([byte(97), end, byte(98), end]) == ["a", "", "b", "", ""]


def test_nothing_pushed_is_nothing() -> None:
    assert pieces([]) == [""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    assert pieces(letters("a€")[:-1]) == ["a", "", "", "\ufffd"]


def test_a_byte_that_is_no_utf8_is_replaced_once_it_is_certain() -> None:
    assert pieces([byte(0xFF), byte(97)]) == ["", "\ufffda", ""]


def test_finishing_twice_gives_the_rest_once() -> None:
    detokenizer = Detokenizer(tokenizer())
    detokenizer.push(byte(0xFF))
    assert (detokenizer.finish(), detokenizer.finish()) == ("\ufffd", "")


any_tokens = st.lists(st.integers(0, 329), max_size=60)
bad_bytes = st.lists(st.sampled_from([0xFF, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x41]).map(byte), max_size=60)
stops = st.lists(st.text(st.sampled_from("ab "), min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(any_tokens)
def test_any_tokens_give_the_text_decoded_at_once(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == decoded(tokens)


@given(bad_bytes)
def test_any_bytes_give_the_text_decoded_at_once(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == decoded(tokens)


@pytest.mark.parametrize("value", [0xFF, 0xE2, 0x80, 0xF0])
def test_bytes_that_are_never_a_character_are_not_held_for_ever(value: int) -> None:
    found = pieces([byte(value)] * 200)
    assert len("".join(found[:-1])) >= 200 - MAX_HELD_TOKENS - 4
    assert "".join(found) == decoded([byte(value)] * 200)


@pytest.mark.parametrize("token", [byte(0xFF), 0], ids=["no UTF-8", "special"])
def test_a_long_run_without_text_costs_the_same_a_token(token: int) -> None:
    longest = 0

    class Recording:
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return str(tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens))

    detokenizer = Detokenizer(Recording())
    for _ in range(200):
        detokenizer.push(token)
    assert longest <= 2 * MAX_HELD_TOKENS


# Stop strings.


def test_the_text_ends_before_a_stop_string() -> None:
    assert "".join(pieces(letters("one two three"), ("two",))) == "one "


def test_a_stop_string_is_found_across_tokens() -> None:
    assert pieces(letters("ab STOP"), ("STOP",)) == ["a", "b", " ", "", "", "", "", ""]


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    assert pieces(letters("aSTx"), ("STOP",)) == ["a", "", "", "STx", ""]


def test_text_held_back_at_the_end_is_given_by_finish() -> None:
    assert pieces(letters("aST"), ("STOP",)) == ["a", "", "", "ST"]


def test_what_is_held_shrinks_to_what_may_still_begin_a_stop_string() -> None:
    assert pieces(letters("aab"), ("aac",)) == ["", "", "aab", ""]


def test_a_stop_string_may_begin_inside_what_looked_like_one() -> None:
    assert "".join(pieces(letters("xaaab!"), ("aab",))) == "xa"


def test_a_stop_string_inside_one_token_is_found() -> None:
    token = next(t for t in range(330) if len(decoded([t])) >= 3 and decoded([t]).isalpha())
    text = decoded([token])
    assert pieces([byte(97), token], (text[1],)) == ["a", text[0], ""]


def test_a_stop_string_at_the_beginning_leaves_nothing() -> None:
    assert "".join(pieces(letters("END"), ("END",))) == ""


def test_a_stop_string_of_several_bytes_is_found() -> None:
    assert "".join(pieces(letters("a€b"), ("€",))) == "a"


def test_nothing_follows_a_stop() -> None:
    detokenizer = Detokenizer(tokenizer(), ("b",))
    for token in letters("ab"):
        detokenizer.push(token)
    assert (detokenizer.stopped, detokenizer.push(byte(99)), detokenizer.finish()) == (True, "", "")


def test_the_stop_string_that_is_complete_first_counts() -> None:
    token = next(t for t in range(330) if len(decoded([t])) >= 3 and decoded([t]).isalpha())
    whole, inner = decoded([token]), decoded([token])[1]
    one_token = "".join(pieces([token], (whole, inner)))
    assert one_token == "".join(pieces(letters(whole), (whole, inner))) == whole[0]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Up to the first stop string that is complete."""
    for end in range(len(text) + 1):
        ends = [end - len(s) for s in stop if text[:end].endswith(s)]
        if ends:
            return text[: min(ends)]
    return text


@given(st.lists(st.sampled_from([97, 98, 32, 0xFF]).map(byte), max_size=40), stops)
def test_any_stop_strings_cut_the_text_decoded_at_once(tokens: list[int], stop: tuple[str, ...]) -> None:
    assert "".join(pieces(tokens, stop)) == cut(decoded(tokens), stop)


# What is done about a stop string.


def pushed(text: str, *stop: str, **options: object) -> tuple[str, bool]:
    """The output and whether it stopped, of a text pushed token by token."""
    detokenizer = Detokenizer(tokenizer(), stop, **options)  # type: ignore[arg-type]
    found = "".join(detokenizer.push(token) for token in tokenizer().encode(text))
    return found + detokenizer.finish(), detokenizer.stopped


def test_a_stop_string_may_stay_in_the_text() -> None:
    assert pushed("one two three", "two", "never", include_stop=True) == ("one two", True)


def test_a_stop_string_within_the_first_tokens_does_not_count() -> None:
    assert pushed("ab ab ab", "ab", min_tokens=2) == ("ab ", True)


def test_a_stop_string_completed_by_the_first_token_that_counts_does() -> None:
    assert len(tokenizer().encode("ab ab")) == 3
    assert pushed("ab ab ab", "ab ab", min_tokens=2) == ("", True)
    assert pushed("ab ab ab", "ab ab", min_tokens=3) == ("ab ", True)


def test_what_was_complete_too_early_does_not_count_later() -> None:
    assert pushed("abcdx", "bc", "abcde", min_tokens=3) == ("abcdx", False)


def test_a_special_token_is_text_if_it_is_to_be_shown() -> None:
    words = tokenizer()
    special = words.eos_token_id
    ids = [*words.encode("ab"), special, *words.encode("cé"), special]
    hidden, shown = Detokenizer(words), Detokenizer(words, shown=(special,))
    assert "".join([*map(hidden.push, ids), hidden.finish()]) == "abcé"
    assert "".join([*map(shown.push, ids), shown.finish()]) == f"ab{words.eos_token}cé{words.eos_token}"
