"""What a session is made of: its history, which is the truth, and what it takes to go on from it.

A client names its session, or it is recognized. Recognizing goes by what the client sends anyway: a request with the
messages m1 … mk, of which the last answer is ma, continues the session whose last turn ended with exactly m1 … ma.

    turn 1   user "hi"                                   no answer yet: a new session, S
             └─ answered "hello":                        key(hi, hello) leads to S
    turn 2   user "hi", assistant "hello", user "and?"   claims key(hi, hello): S
             └─ answered "well":                         key(hi, hello, and?, well) leads to S

A key is claimed once. So two conversations that say the same so far are two sessions, each finds one of the two, and
they stay apart when they part; and a turn that is asked anew, or from an earlier point, is a new session, whose
beginning the router finds by its prefix.
"""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the client's functions, as the model asked for it. `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; content parts are already joined.

    An answer may hold `tool_calls`; a message of role tool names the one it answers by `tool_call_id`.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A stored session without its history. Times are seconds since 1970."""

    session_id: str
    tokens: int = 0
    turns: int = 0
    seed: int | None = None
    parent: str | None = None
    created: float = 0.0
    updated: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> SessionSummary:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Session:
    """A session as it is stored.

    `token_ids` are prompt and output as the target computed them: the text does not always give the same ones again.
    `messages` say the same in words, for the chat template; a session of plain completions has none. `tools`, as JSON,
    and `instructions` are what `token_ids` begin with beside them. `responses` are those of /v1/responses that can be
    asked for again, as JSON by id. `seed`, with the positions that follow from `token_ids`, is all the state of
    sampling. `window` is what a streaming window has moved, by name; empty if nothing was.
    """

    session_id: str
    token_ids: tuple[int, ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    turns: int = 0
    seed: int | None = None
    parent: str | None = None
    window: Mapping[str, int] = field(default_factory=dict)
    created: float = 0.0
    updated: float = 0.0
    tools: str = ""
    instructions: str = ""
    responses: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> SessionSummary:
        tokens = len(self.token_ids)
        return SessionSummary(self.session_id, tokens, self.turns, self.seed, self.parent, self.created, self.updated)

    def to_json(self) -> str:
        """Token ids as base64 of little-endian int32: a third of their decimal digits."""
        ids = array("i", self.token_ids)
        fields = {
            **self._plain(),
            "messages": [astuple(each) for each in self.messages],
            "token_ids": base64.b64encode(ids.tobytes()).decode(),
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str | bytes) -> Session:
        fields: dict[str, Any] = json.loads(text)
        ids = array("i", base64.b64decode(fields.pop("token_ids")))
        messages = tuple(_message(*each) for each in fields.pop("messages"))
        return cls(token_ids=tuple(ids), messages=messages, **fields)

    def _plain(self) -> dict[str, Any]:
        names = ("session_id", "turns", "seed", "parent", "created", "updated", "tools", "instructions")
        mappings = {"window": dict(self.window), "responses": dict(self.responses)}
        return {name: getattr(self, name) for name in names} | mappings


def _message(
    role: str, content: str, name: str | None = None, calls: Sequence[Sequence[str]] = (), call_id: str | None = None
) -> ChatMessage:
    return ChatMessage(role, content, name, tuple(ToolCall(*call) for call in calls), call_id)


def answered(messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
    """The messages up to the last answer; none if there is none."""
    last = max((n for n, message in enumerate(messages, start=1) if message.role == "assistant"), default=0)
    return messages[:last]


def turn_key(model: str, messages: Sequence[ChatMessage]) -> str:
    """What a conversation that ends with these messages is found by. What clients change does not count: space around
    a message, how the arguments of a call are spaced, and the ids of calls."""
    said = [astuple(_normal(message)) for message in messages]
    return hashlib.sha256(json.dumps([model, said]).encode()).hexdigest()[:40]


def _normal(message: ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall("", call.name, _respaced(call.arguments)) for call in message.tool_calls)
    return replace(message, content=message.content.strip(), tool_calls=calls, tool_call_id=None)


def _respaced(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text
