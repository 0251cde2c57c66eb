"""Writing the training text: in streams on a GPU, through our engine elsewhere."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.distill.chat import ChatFormat, encoded
from paceline.distill.openings import Opening
from paceline.distill.streams import LONGEST_ANSWER, LONGEST_LINE, NEW_CONVERSATION, USER_TEMPERATURE, StreamWriter
from paceline.distill.text import Rows, pack
from paceline.engine.engine import Engine
from paceline.types import Request, SamplingParams

LONGEST_OPENING = 160
"""Tokens of an opening; longer ones leave no room in a row."""
MAX_STREAMS = 2048
STREAM_MEMORY_SHARE = 0.35
DocumentTokens = tuple[list[int], list[bool]]


class Writer(ABC):
    """Writes some rows at a time."""

    @abstractmethod
    def write(self) -> tuple[Rows, torch.Tensor | None]:
        """Rows, and the hidden state after each of their tokens if they are at hand."""


class StreamsWriter(Writer):
    """A `StreamWriter` as a `Writer`."""

    def __init__(self, streams: StreamWriter) -> None:
        self._streams = streams

    def write(self) -> tuple[Rows, torch.Tensor | None]:
        return self._streams.write()


class EngineWriter(Writer):
    """Batches of conversations through an engine: a prompt's answer is one request, a user's line another."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        starts: Sequence[tuple[list[int], bool]],
        eos: Collection[int],
        *,
        batch: int,
        length: int,
        seed: int,
    ) -> None:
        self._engine, self._chat, self._starts, self._eos = engine, chat, starts, eos
        self._batch, self._length = batch, length
        self._chance = random.Random(seed)
        self._ids = itertools.count(1)

    def write(self) -> tuple[Rows, torch.Tensor | None]:
        documents = [self._opened() for _ in range(self._batch)]
        users = [document for document, answering in documents if not answering]
        answers = [document for document, answering in documents if answering]
        self._draw(users, lambda: USER_TEMPERATURE, LONGEST_LINE, user=True)
        answers += [document for document in users if self._closed(document)]
        self._draw(answers, self._temperature, LONGEST_ANSWER, user=False)
        again = [document for document in answers if self._goes_on(document)]
        if again:
            self._draw(again, lambda: USER_TEMPERATURE, LONGEST_LINE, user=True)
            self._draw([d for d in again if self._closed(d)], self._temperature, LONGEST_ANSWER, user=False)
        return pack([document for document, _ in documents], self._length), None

    def _opened(self) -> tuple[DocumentTokens, bool]:
        ids, answering = self._chance.choice(self._starts)
        return (list(ids), [False] * len(ids)), answering

    def _temperature(self) -> float:
        return 0.0 if self._chance.random() < 0.5 else 0.6 + 0.4 * self._chance.random()

    def _closed(self, document: DocumentTokens) -> bool:
        """Whether the model ended the user's line; then the words before an answer follow."""
        ids, drawn = document
        if not ids or ids[-1] != self._chat.end_of_user:
            return False
        ids.extend(self._chat.before_answer[1:])
        drawn.extend([False] * (len(ids) - len(drawn)))
        return True

    def _goes_on(self, document: DocumentTokens) -> bool:
        ids, drawn = document
        ended = bool(ids) and ids[-1] in self._eos and drawn[-1]
        if not self._chat.writes_users or not ended or self._chance.random() < NEW_CONVERSATION:
            return False
        ids.extend(self._chat.before_next_user)
        drawn.extend([False] * (len(ids) - len(drawn)))
        return True

    def _draw(
        self, documents: Sequence[DocumentTokens], temperature: Callable[[], float], limit: int, *, user: bool
    ) -> None:
        """Let the model go on with each; what it draws counts as an answer unless it writes in the user's place."""
        waiting: dict[str, DocumentTokens] = {}
        stops = (self._chat.end_of_user,) if user else ()
        for document in documents:
            room = self._length - len(document[0])
            if room < 1:
                continue
            name = f"distill-{next(self._ids)}"
            params = SamplingParams(
                max_tokens=min(limit, room),
                temperature=temperature(),
                seed=self._chance.getrandbits(63),
                stop_token_ids=stops,
            )
            self._engine.add(Request(name, tuple(document[0]), params))
            waiting[name] = document
        while self._engine.has_work:
            for name, delta in self._engine.step().items():
                ids, drawn = waiting[name]
                ids.extend(delta.token_ids)
                drawn.extend([not user] * len(delta.token_ids))


def encode(tokenizer: Any, chat: ChatFormat, openings: Sequence[Opening]) -> list[tuple[list[int], bool]]:
    """Token ids, and whether an answer follows them; as often as they are given, less those too long for a row."""
    usable = [each for each in openings if each.whole or chat.writes_users]
    unique = list(dict.fromkeys(usable))
    ids = dict(zip(unique, encoded(tokenizer, chat, [each.text for each in unique]), strict=True))
    close = list(chat.before_answer)
    found = [(ids[each] + close, True) if each.whole else (ids[each], False) for each in usable]
    return [(tokens, answer) for tokens, answer in found if 0 < len(tokens) <= LONGEST_OPENING]


def streams_that_fit(model: PreTrainedModel, length: int) -> int:
    """As many as a share of the GPU's free memory holds KV for."""
    config = model.config.get_text_config(decoder=True)
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_stream: int = 2 * config.num_hidden_layers * heads * dim * length * model.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(MAX_STREAMS, int(free * STREAM_MEMORY_SHARE) // a_stream))
