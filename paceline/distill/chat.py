"""What stands around the turns of a conversation, read off the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = ("\u2402one\u2402", "\u2402two\u2402", "\u2402three\u2402")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Token ids around the turns. A base model without a template has none: its documents are plain text.

        before_user ─ user's line ─ before_answer ─ answer, ends with an EOS ─ before_next_user ─ …

    `before_answer[0]` is what the model itself writes at the end of a user's line if `writes_users`; the ids of
    `before_next_user` follow the EOS.
    """

    before_user: str
    before_answer: tuple[int, ...]
    before_next_user: tuple[int, ...]
    writes_users: bool
    template: bool

    @property
    def end_of_user(self) -> int:
        """Ends a line the model wrote in the user's place; -1 where it never writes one."""
        return self.before_answer[0] if self.writes_users else -1


def chat_format(tokenizer: Any, eos: Collection[int]) -> ChatFormat:
    """Reads the template by rendering marks through it."""
    if not getattr(tokenizer, "chat_template", None):
        return ChatFormat("", (), (), writes_users=False, template=False)
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, rest = text.split(_MARKS[0], 1)
    to_answer, rest = rest.split(_MARKS[1], 1)
    to_user, _ = rest.split(_MARKS[2], 1)
    before_answer = tuple(_ids(tokenizer, to_answer))
    before_next_user = tuple(_ids(tokenizer, to_user))
    if before_next_user and before_next_user[0] in eos:
        before_next_user = before_next_user[1:]
    # Only a special token is sure to stand alone where a line ends; ordinary characters merge with their neighbours.
    special = bool(before_answer) and before_answer[0] in set(tokenizer.all_special_ids) | set(eos)
    return ChatFormat(before, before_answer, before_next_user, writes_users=special, template=True)


def encoded(tokenizer: Any, chat: ChatFormat, texts: Sequence[str]) -> list[list[int]]:
    """Conversations up to the end of each text, the user's line or its beginning."""
    if not texts:
        return []
    # A template writes BOS itself; plain text gets it from the tokenizer.
    found = tokenizer([chat.before_user + text for text in texts], add_special_tokens=not chat.template)["input_ids"]
    return [list(ids) for ids in found]


def prompts(tokenizer: Any, chat: ChatFormat, texts: Sequence[str]) -> list[list[int]]:
    """Conversations up to where the answer to each text begins."""
    return [[*ids, *chat.before_answer] for ids in encoded(tokenizer, chat, texts)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
