"""Prompt lookup against a search that has no index."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from paceline.speculation.lookup import LONGEST_MATCH, LONGEST_NGRAM, Match, PromptLookup

texts = st.lists(st.integers(0, 3), max_size=40)


def naive(tokens: list[int]) -> Match | None:
    """The latest earlier occurrence of the longest suffix of at most LONGEST_NGRAM tokens."""
    for n in range(min(LONGEST_NGRAM, len(tokens)), 0, -1):
        for start in range(len(tokens) - 1, n - 1, -1):
            if tokens[start - n : start] == tokens[-n:]:
                length = n
                while length < min(LONGEST_MATCH, start) and tokens[start - 1 - length] == tokens[-1 - length]:
                    length += 1
                return Match(start, length)
    return None


def guess(tokens: list[int], count: int) -> tuple[int, ...] | None:
    lookup = PromptLookup(tokens)
    match = lookup.match()
    return None if match is None else lookup.candidates(match, count)


@given(texts)
def test_a_match_is_the_latest_of_the_longest(tokens: list[int]) -> None:
    assert PromptLookup(tokens).match() == naive(tokens)


@given(texts, texts)
def test_pushing_in_parts_is_pushing_at_once(first: list[int], second: list[int]) -> None:
    parts = PromptLookup(first)
    parts.extend(second)
    assert (parts.tokens, parts.match()) == (first + second, PromptLookup(first + second).match())


def test_candidates_are_what_followed() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 3) == (4, 5, 6)


def test_a_longer_ngram_beats_a_later_shorter_one() -> None:
    assert guess([7, 8, 1, 5, 8, 2, 5, 7, 8], 1) == (1,)


def test_of_equals_the_latest_wins() -> None:
    assert guess([8, 1, 8, 2, 8], 1) == (2,)


def test_a_match_at_the_end_goes_on_with_its_own_guesses() -> None:
    assert guess([1, 2, 3, 1, 2, 3, 1], 8) == (2, 3, 1, 2, 3, 1, 2, 3)


def test_one_repeated_token_repeats() -> None:
    assert guess([5, 5], 4) == (5, 5, 5, 5)


def test_a_text_without_repetition_has_no_candidates() -> None:
    assert guess([1, 2, 3, 4], 4) is None


def test_an_empty_text_has_no_candidates() -> None:
    assert guess([], 4) is None


def test_ids_of_the_largest_vocabularies_do_not_collide() -> None:
    big = 2**24 - 1
    assert guess([0, big, 5, big, 0, 6, 0, big], 1) == (5,)


def test_the_index_grows_by_four_entries_a_token() -> None:
    lookup = PromptLookup(range(1000))
    assert sum(map(len, lookup._latest)) <= LONGEST_NGRAM * 1000
    assert sum(map(sys.getsizeof, lookup._latest)) < 1000 * 300


def test_a_long_text_is_forgotten_but_for_its_end() -> None:
    lookup = PromptLookup([1, 2, 3], longest=4)
    lookup.extend([4, 5, 6, 7])
    assert len(lookup) == 7
    lookup.extend([8, 6])
    assert lookup.tokens == [6, 7, 8, 6]
    match = lookup.match()
    assert match is not None and lookup.candidates(match, 2) == (7, 8)
    lookup.extend([1])
    assert lookup.match() is None
