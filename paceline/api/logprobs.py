"""Log probabilities in OpenAI's words: tokens as text and bytes, not ids."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from paceline.api.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    TopLogprob,
)
from paceline.api.prompts import Tokenizer
from paceline.types import TokenLogprobs

LOWEST = -9999.0
"""JSON has no infinity; OpenAI reports this for what is all but impossible."""

BYTE_SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
PIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The bytes a token adds to the text. One token may be part of a character, so it is bytes, not text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._spell(token_id)
        return found

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that are left out of an answer's text."""
        return frozenset(self._tokenizer.all_special_ids)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        """Of a byte-level vocabulary, the character that stands for each byte; empty for any other.

        Each kind spells a space in its own way. A vocabulary may lack bytes that its training never saw.
        """
        vocabulary = self._tokenizer.get_vocab()
        return byte_alphabet() if BYTE_SPACE in vocabulary and PIECE_SPACE not in vocabulary else {}

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a model may have more ids than its tokenizer
            return b""
        if token_id in self._added:
            return token.encode()
        if self._alphabet:
            return bytes(self._alphabet[character] for character in token if character in self._alphabet)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace(PIECE_SPACE, " ").encode()


class Offsets:
    """Where each token of a growing text begins, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def step(self, data: bytes) -> int:
        """The offset of the token with these bytes, which come next."""
        start = self._length
        self._length += len(self._decoder.decode(data))
        return start


def chat_logprobs(entries: Iterable[TokenLogprobs], texts: TokenTexts) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **_top(entry.token_id, entry.logprob, texts).model_dump(),
                top_logprobs=[_top(token_id, logprob, texts) for token_id, logprob in entry.top],
            )
            for entry in entries
        ]
    )


def completion_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenTexts, offsets: Offsets, first: int | None = None
) -> CompletionLogprobs:
    """OpenAI's older form. Offsets count from the beginning of the choice's text; the top holds the token itself.

    `first` is a token in front that nothing predicts: its probabilities are null.
    """
    tokens = [*([] if first is None else [first]), *(entry.token_id for entry in entries)]
    unknown: list[None] = [] if first is None else [None]
    return CompletionLogprobs(
        tokens=[texts.text_of(token) for token in tokens],
        token_logprobs=[*unknown, *(_finite(entry.logprob) for entry in entries)],
        top_logprobs=[*unknown, *(_by_text(entry, texts) for entry in entries)],
        text_offset=[offsets.step(b"" if token in texts.special else texts.bytes_of(token)) for token in tokens],
    )


def prompt_logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's form: null for the first token, then by token id the prompt's own token and the likeliest."""
    told: list[dict[str, PromptLogprob] | None] = [None]
    for entry in entries:
        ranked = [(entry.token_id, entry.logprob, entry.rank)]
        ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
        told.append(
            {
                str(token_id): PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=texts.text_of(token_id))
                for token_id, logprob, rank in reversed(ranked)
            }
        )
    return told


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _top(token_id: int, logprob: float, texts: TokenTexts) -> TopLogprob:
    data = texts.bytes_of(token_id)
    return TopLogprob(token=data.decode(errors="replace"), logprob=_finite(logprob), bytes=list(data))


def _by_text(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, float]:
    """Of two tokens with the same text the likelier is told."""
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        found.setdefault(texts.text_of(token_id), _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
