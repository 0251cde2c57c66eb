"""Prompt lookup: candidates from the sequence's own text, after the last place where its latest tokens occurred.

As in Transformers' `prompt_lookup_num_tokens` (Saxena 2023), over prompt and output, with two differences: the
latest occurrence of the longest n-gram wins, not the first, and a match that runs into the end of the text goes
on with what it has just guessed, so that a repeating text yields as many candidates as are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LONGEST_NGRAM = 4
LONGEST_MATCH = 16
"""How far back a match is followed. Longer ones say no more about what comes next."""
_SHIFT = 24
"""Bits of a token id inside an n-gram's key."""


@dataclass(frozen=True, slots=True)
class Match:
    """The text's last `length` tokens occurred before (up to LONGEST_MATCH); what followed begins at `start`."""

    start: int
    length: int


class PromptLookup:
    """The text of one sequence and where each of its n-grams occurred last, n from 1 to 4.

    A token costs four insertions when it is pushed; a match costs four look-ups at most. A text of more than twice
    `longest` tokens is forgotten but for its last `longest`: what a streaming window dropped is hardly said again, and
    n-grams take 200 bytes a token and more.
    """

    __slots__ = ("_latest", "_longest", "tokens")

    def __init__(self, tokens: Iterable[int] = (), longest: int | None = None) -> None:
        self.tokens: list[int] = []
        self._longest = longest
        # Of each n: the n-gram, packed into one integer, to the position after its latest occurrence. The
        # text's own last n-gram is not in yet, so that it never finds itself.
        self._latest: tuple[dict[int, int], ...] = tuple({} for _ in range(LONGEST_NGRAM))
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Push tokens at the end."""
        one, two, three, four = self._latest
        text = self.tokens
        position = len(text)
        d = text[-1] if position > 0 else 0
        c = text[-2] if position > 1 else 0
        b = text[-3] if position > 2 else 0
        a = text[-4] if position > 3 else 0
        for token in tokens:
            if position > 0:
                key = d
                one[key] = position
                if position > 1:
                    key |= c << _SHIFT
                    two[key] = position
                    if position > 2:
                        key |= b << (2 * _SHIFT)
                        three[key] = position
                        if position > 3:
                            four[key | a << (3 * _SHIFT)] = position
            a, b, c, d = b, c, d, token
            text.append(token)
            position += 1
        if self._longest is not None and position > 2 * self._longest:
            self._forget(self._longest)

    def _forget(self, kept: int) -> None:
        """Everything but the last `kept` tokens."""
        latest, self.tokens = self.tokens[-kept:], []
        for ngrams in self._latest:
            ngrams.clear()
        self.extend(latest)

    def match(self) -> Match | None:
        """The latest earlier occurrence of the longest n-gram at the end of the text."""
        text = self.tokens
        for n in range(min(LONGEST_NGRAM, len(text)), 0, -1):
            key = 0
            for token in text[-n:]:
                key = key << _SHIFT | token
            start = self._latest[n - 1].get(key)
            if start is not None:
                return Match(start, self._follow_back(start, n))
        return None

    def candidates(self, match: Match, count: int) -> tuple[int, ...]:
        """The `count` tokens that followed; past the end of the text, those just guessed."""
        found = self.tokens[match.start : match.start + count]
        period = len(found)
        while len(found) < count:
            found.append(found[len(found) - period])
        return tuple(found)

    def _follow_back(self, start: int, length: int) -> int:
        """How many tokens agree before `start` and before the end, given that `length` do."""
        text, end = self.tokens, len(self.tokens)
        longest = min(LONGEST_MATCH, start)
        while length < longest and text[start - 1 - length] == text[end - 1 - length]:
            length += 1
        return length
