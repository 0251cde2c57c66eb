"""From messages or text to token ids: roles, the chat template, the tokenizer and the bounds of both."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from paceline.api.tool_forms import ParserName
from paceline.api.tools import Tool, ToolDialect
from paceline.errors import InvalidRequest
from paceline.sessions.history import ChatMessage as ChatMessage
from paceline.types import Prompt

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles a client may use, and the one the chat template sees. `developer` is OpenAI's later word for system."""

INLINE_CHARS = 8192
"""Longer input is tokenized in a thread: the event loop also carries everybody's streams."""

MAX_SESSION_ID_CHARS = 256

ANSWER_MARK = "\ue000answer\ue001"
"""Stands for an answer while the template renders what comes after it: private characters, that nobody writes."""


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that is used here."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Any, *, tools: Any = ..., tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    # Only for log probabilities.

    def get_added_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...


class PromptEncoder:
    """Renders and tokenizes what clients send, up to so many characters and messages. Every refusal names the field."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tool_call_parser: ParserName | Literal["auto"] = "auto",
        max_chars: int = sys.maxsize,
        max_messages: int = sys.maxsize,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        self._max_messages = max_messages
        self.tools = ToolDialect(
            tokenizer.chat_template, tokenizer.get_vocab(), tokenizer.all_special_ids, tool_call_parser
        )
        """How this model is told of functions and calls them."""
        self._vocabulary = 1 + max(tokenizer.get_vocab().values())
        # A tokenizer applies its truncation and padding settings on first use. Done here, it is never written
        # to again, and threads may share it.
        tokenizer.encode("a")

    async def chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation, ending where the assistant's answer begins."""
        if not self._tokenizer.chat_template:
            raise InvalidRequest("messages: this model has no chat template; send a prompt instead", param="messages")
        size = self._checked_size(messages, tools)
        return await _off_loop(lambda: self._render(messages, tools), size)

    async def turn(
        self,
        history: Sequence[int],
        before: Sequence[ChatMessage],
        new: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
    ) -> tuple[int, ...]:
        """Token ids of a conversation that goes on: `history` as it was computed, and what the template puts behind
        its last answer. `before` says the same in words; without an answer at its end all of it is rendered anew.

        An answer's text, tokenized, is not always the tokens it came from: then a KV cache of it would be useless.
        """
        if not history or not before or before[-1].role != "assistant":
            return await self.chat([*before, *new], tools)
        self._checked_size(new)
        marked = [*before[:-1], replace(before[-1], content=ANSWER_MARK, tool_calls=()), *new]
        behind = await _off_loop(lambda: self._behind_answer(marked, tools), _size(marked))
        if not behind:
            return await self.chat([*before, *new], tools)
        # The model ended its answer itself, with the token that the template puts there.
        ended = behind[0] == history[-1] and behind[0] in self._tokenizer.all_special_ids
        return (*history, *behind[ended:])

    async def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, with the special tokens this tokenizer adds, or the ids themselves, checked."""
        if not prompt:
            raise InvalidRequest("prompt: must not be empty", param="prompt")
        if not isinstance(prompt, str):
            self.check_ids("prompt", prompt)
            return tuple(prompt)
        return await self.text("prompt", prompt)

    async def text(self, param: str, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text, with the `special` tokens this tokenizer adds."""
        self._check_chars(param, len(text))
        check_unicode(param, text)
        return await _off_loop(lambda: tuple(self._tokenizer.encode(text, add_special_tokens=special)), len(text))

    async def detokenize(self, param: str, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        self.check_ids(param, token_ids)
        return await asyncio.to_thread(self.text_of, token_ids, special=True)

    def text_of(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some tokens, and of the `special` ones among them."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not special)

    def check_ids(self, param: str, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest if an id is outside the vocabulary."""
        for token in token_ids:
            if not 0 <= token < self._vocabulary:
                raise InvalidRequest(
                    f"{param}: token id {token} is not in the vocabulary of {self._vocabulary}", param=param
                )

    def _checked_size(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> int:
        """Characters of the messages and the functions. Raises InvalidRequest if they are too many."""
        check_count(len(messages), self._max_messages)
        size = _size(messages) + sum(len(tool.parameters) for tool in tools)
        self._check_chars("messages", size)
        return size

    def _check_chars(self, param: str, size: int) -> None:
        if size > self._max_chars:
            raise InvalidRequest(
                f"{param}: {size} characters are more than are taken here, {self._max_chars} (limits.max_prompt_chars)",
                param=param,
            )

    def _behind_answer(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[int, ...]:
        """Token ids of what is rendered behind the marked answer; none if the template moved or changed the mark, or
        does not take a result without its call."""
        try:
            text = self._apply(messages, tools, tokenize=False)
        except InvalidRequest:
            return ()
        if text.count(ANSWER_MARK) != 1:
            return ()
        return tuple(self._tokenizer.encode(text.partition(ANSWER_MARK)[2], add_special_tokens=False))

    def _apply(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], *, tokenize: bool) -> Any:
        conversation = self.tools.conversation(messages, tools)
        told = {"tools": [tool.described() for tool in tools]} if tools and self.tools.native else {}
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=tokenize, add_generation_prompt=True, **told
            )
        except (TemplateError, TypeError) as error:
            # Raised by the model's template for a conversation it does not know, such as two user turns in a row.
            raise InvalidRequest(f"messages: refused by the chat template: {error}", param="messages") from None

    def _render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[int, ...]:
        encoded = self._apply(messages, tools, tokenize=True)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return tuple(int(token) for token in ids)


def check_count(messages: int, most: int) -> None:
    """Raise InvalidRequest for more messages than one request may hold."""
    if messages > most:
        raise InvalidRequest(f"messages: at most {most} in one request, got {messages}", param="messages")


def check_messages(messages: Sequence[ChatMessage], source: str = "messages") -> list[ChatMessage]:
    """The messages with the template's role names. Raises InvalidRequest naming the one that is wrong."""
    if not messages:
        raise InvalidRequest(f"{source}: must hold at least one message", param=source)
    checked = []
    for index, message in enumerate(messages):
        role = ROLES.get(message.role)
        if role is None:
            field = f"{source}.{index}.role"
            raise InvalidRequest(f"{field}: unknown role {shown(message.role)}; one of {', '.join(ROLES)}", param=field)
        check_unicode(f"{source}.{index}.content", message.content)
        check_unicode(f"{source}.{index}.name", message.name or "")
        for place, call in enumerate(message.tool_calls):
            check_unicode(f"{source}.{index}.tool_calls.{place}", f"{call.call_id}{call.name}{call.arguments}")
        if role == "tool" and not message.tool_call_id:
            field = f"{source}.{index}.tool_call_id"
            raise InvalidRequest(f"{field}: required in a message of role tool", param=field)
        check_unicode(f"{source}.{index}.tool_call_id", message.tool_call_id or "")
        checked.append(replace(message, role=role))
    return checked


def instructed(instructions: str, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages behind instructions of a request's own, in one system message with those they begin with."""
    if not instructions:
        return list(messages)
    own = messages[0].content if messages and messages[0].role == "system" else None
    first = ChatMessage("system", instructions if own is None else f"{instructions}\n\n{own}")
    return [first, *messages[own is not None :]]


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise InvalidRequest for a function that cannot be written down."""
    for index, tool in enumerate(tools):
        check_unicode(f"tools.{index}", tool.description + tool.parameters)


def check_session_id(session_id: str) -> str:
    """A client's session id, or InvalidRequest. It must survive being an HTTP header."""
    printable = session_id.isprintable() and session_id == session_id.strip()
    if not (printable and 1 <= len(session_id) <= MAX_SESSION_ID_CHARS):
        raise InvalidRequest(
            f"session_id: must be 1 to {MAX_SESSION_ID_CHARS} printable characters without a space at either end",
            param="session_id",
        )
    return session_id


def shown(text: str, limit: int = 100) -> str:
    """A client's text, quoted and cut, for an error message."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _size(messages: Sequence[ChatMessage]) -> int:
    """Characters to tokenize, about."""
    return sum(len(message.content) + sum(len(call.arguments) for call in message.tool_calls) for message in messages)


def check_unicode(param: str, text: str) -> None:
    """JSON can spell half a surrogate pair (\\ud800), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{param}: not valid Unicode at character {error.start}", param=param) from None


async def _off_loop(work: Callable[[], tuple[int, ...]], size: int) -> tuple[int, ...]:
    return work() if size <= INLINE_CHARS else await asyncio.to_thread(work)
