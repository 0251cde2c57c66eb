"""From token ids to text, a token at a time, with stop strings found across token borders."""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CHARACTER_TOKENS = 4
"""A character takes at most four bytes of UTF-8, so at most so many tokens that give any text."""
MAX_HELD_TOKENS = 16
"""Tokens without text, or with bytes that are no UTF-8, after which the older ones are settled as they are."""


class Decoder(Protocol):
    """The part of a tokenizer used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


def without_wrapping(decoder: Decoder) -> Decoder:
    """What a Transformers tokenizer calls in the end, if it changes nothing about the text: a third of the time."""
    backend: Decoder | None = getattr(decoder, "backend_tokenizer", None)
    own = getattr(type(decoder), "_decode", None)
    usual = getattr(own, "__module__", "").startswith("transformers.tokenization_utils")
    if backend is None or not usual or getattr(decoder, "clean_up_tokenization_spaces", True):
        return decoder
    return backend


class Detokenizer:
    """Text of one growing output.

    Decoding a single token is wrong (spaces, bytes of one character spread over tokens), decoding everything
    each time is quadratic. So a short tail is decoded twice, with and without the new token, and the
    difference is the new text; it is held back while it ends inside a UTF-8 character. Bytes that never
    become one are U+FFFD, as in the whole output decoded at once.

    `push` returns the text that is final; text that could still turn out to begin a stop string is held
    back until it is decided, `finish` returns what is left. Once `stopped`, the text ends before the stop
    string that was complete first, wherever tokens begin and end; or after it, with `include_stop`. Stop
    strings complete within the first `min_tokens` do not count. Of the special tokens only those `shown` are text.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        shown: tuple[int, ...] = (),
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._shown = frozenset(shown)
        self._ids: list[int] = []
        self._tail_start = 0
        self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._tail_start : self._read])
        text = self._decode(self._ids[self._tail_start :])
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return self._release(self._settle(known, text))
        self._tail_start, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """The text held back, at the end of the output."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._tail_start : self._read])
        rest = self._decode(self._ids[self._tail_start :])[len(known) :]
        self._tail_start = self._read = len(self._ids)
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _settle(self, known: str, text: str) -> str:
        """Of a long held tail, the text that no later token can change; so the tail stays short."""
        split = len(self._ids) - CHARACTER_TOKENS
        if split - self._read < MAX_HELD_TOKENS:
            return ""
        settled = self._decode(self._ids[self._tail_start : split])
        if settled + self._decode(self._ids[split:]) != text:
            return ""  # the split would fall inside a character
        self._tail_start = self._read = split
        return settled[len(known) :]

    def _release(self, new: str) -> str:
        text = self._held + new
        found = self._find_stops(text) if len(self._ids) > self._min_tokens else []
        if found:
            self.stopped, self._held = True, ""
            end, start = min(found)
            return text[: end if self._include_stop else start]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _find_stops(self, text: str) -> list[tuple[int, int]]:
        """(end, start) of stop strings that the text after the held one completes."""
        first = {stop: max(0, len(self._held) + 1 - len(stop)) for stop in self._stop}
        return [(at + len(stop), at) for stop in self._stop if (at := text.find(stop, first[stop])) >= 0]

    def _decode(self, ids: list[int]) -> str:
        """The text of these ids. What is on either side of a shown token is decoded by itself."""
        if not self._shown.isdisjoint(ids):
            at = next(place for place, token in enumerate(ids) if token in self._shown)
            shown = self._decoder.decode([ids[at]], skip_special_tokens=False)
            return self._decode(ids[:at]) + shown + self._decode(ids[at + 1 :])
        return self._decoder.decode(ids, skip_special_tokens=True) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
