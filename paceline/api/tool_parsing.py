"""Calls of the client's functions in what a model writes: found while the text grows.

In whatever form (`paceline.api.tool_forms`) a model was taught, it may also write the call alone, as plain JSON. What
turns out to be no call, or is one of a function nobody offered, is content as it was written. Once a call's arguments
have begun it is a call: the arguments are passed on as the model writes them, and if the output ends early, so do they.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from paceline.api.json_scan import ValueScan
from paceline.api.tool_forms import Form
from paceline.sessions.history import ToolCall

CALL_ID_CHARS = 9
"""Mistral's chat template takes ids of nine letters and digits, and no others; every other template takes these too."""

_KEYS = frozenset({"name", "arguments", "parameters", "type", "id", "function"})
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"')
_NO_OBJECT = re.compile(r'\{\s*[^\s"]')
_HEADER = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(?=\{)")
_NAME_SO_FAR = re.compile(r"\s*[\w.-]*(?:\[[\w\]]*)*\s*")


@dataclass(frozen=True, slots=True)
class Content:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Event = Content | CallBegins | Arguments


class _State(Enum):
    TEXT = auto()
    """Content, up to the next mark."""
    BODY = auto()
    """Behind a mark: an object or a list of them has to begin."""
    HEADER = auto()
    """In an object, of which it is not known yet whether it is a call."""
    ARGUMENTS = auto()
    """In the arguments of a call."""
    REST = auto()
    """Behind them, in the same object."""
    AFTER = auto()
    """Behind a call: another, the closing mark, or text."""


class ToolCallReader:
    """Reads one output. The events depend on the text alone, not on how it was cut: `push` holds back what may still
    begin a mark or a call. `seed` makes the ids: the same for the same output, wherever it is read again."""

    def __init__(self, form: Form, names: Iterable[str], seed: str, *, parallel: bool = True) -> None:
        self._form = form
        self._names = frozenset(names)
        self._seed = seed
        self._parallel = parallel
        self._state = _State.TEXT
        self._buffer = ""
        self._lead = ""  # what was taken since the mark, given back if no call follows
        self._scan = ValueScan()
        self._list = False
        self._nested = False  # whether the arguments are part of an object
        self._began = False  # whether anything but space has been read
        self._over = False
        self._events: list[Event] = []
        self.count = 0
        """Calls begun so far."""

    def push(self, text: str) -> list[Event]:
        """What is certain with this text added."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """What was held back, at the end of the output."""
        self._over = True
        found = self._run()
        if self._state in (_State.BODY, _State.HEADER):
            self._give_back()
            found += self._run()
        return found

    def _run(self) -> list[Event]:
        steps = {
            _State.TEXT: self._text,
            _State.BODY: self._body,
            _State.HEADER: self._header,
            _State.ARGUMENTS: self._arguments,
            _State.REST: self._rest,
            _State.AFTER: self._after,
        }
        while steps[self._state]():
            pass
        found, self._events = _joined(self._events), []
        return found

    def _text(self) -> bool:
        """Content up to a mark. Space in front of a mark belongs to neither, so it waits for what follows."""
        if not self._began and self._begins_bare():
            return True
        if not self._began and not self._buffer.strip() and not self._over:
            return False
        mark = self._form.mark
        at = self._buffer.find(mark) if mark else -1
        if at >= 0:
            self._content(self._buffer[:at].rstrip())
            self._lead = self._buffer[len(self._buffer[:at].rstrip()) : at + len(mark)]
            self._buffer = self._buffer[at + len(mark) :]
            self._began = True
            self._state = _State.BODY
            return True
        keep = 0 if self._over else _overlap(self._buffer, mark)
        sure = self._buffer[: len(self._buffer) - keep]
        if not self._over:
            sure = sure.rstrip()
        if self._over and self.count and not sure.strip():
            sure, self._buffer = "", ""
        self._began = self._began or bool(sure.strip())
        self._content(sure)
        self._buffer = self._buffer[len(sure) :]
        return False

    def _begins_bare(self) -> bool:
        """Whether the whole output begins as a call without a mark."""
        stripped = self._buffer.lstrip()
        if not stripped.startswith(("{", "[")) or self._form.mark.startswith(stripped):
            return False
        if self._form.mark and stripped.startswith(self._form.mark):
            return False
        self._lead = self._buffer[: len(self._buffer) - len(stripped)]
        self._buffer = stripped
        self._began = True
        self._state = _State.BODY
        return True

    def _body(self) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        if stripped[0] == "{":
            self._take(len(self._buffer) - len(stripped))
            self._state = _State.HEADER
            self._scan = ValueScan()
            return True
        if stripped[0] == "[" and not self._list:
            self._take(len(self._buffer) - len(stripped) + 1)
            self._list = True
            return True
        if self._form.name == "mistral" and not self._list:
            return self._named()
        self._give_back()
        return True

    def _named(self) -> bool:
        """The later form of Mistral's: the name in front of the arguments."""
        found = _NAMED.match(self._buffer)
        if found is None:
            if _NAME_SO_FAR.fullmatch(self._buffer) and not self._over:
                return False
            self._give_back()
            return True
        if found[1] not in self._names:
            self._give_back()
            return True
        self._begin(found[1], nested=False)
        self._drop(found.end())
        return True

    def _header(self) -> bool:
        """Name first and arguments next is known at once; any other order when the object is complete."""
        found = _HEADER.match(self._buffer)
        if found is not None and found[1] in self._names:
            self._begin(found[1], nested=True)
            self._drop(found.end())
            return True
        first = _FIRST_KEY.match(self._buffer)
        if _NO_OBJECT.match(self._buffer) or (first is not None and first[1] not in _KEYS) or found is not None:
            self._give_back()
            return True
        end = self._scan.end(self._buffer)
        if end is None:
            return False
        call = _call_in(self._buffer[:end])
        if call is None or call[0] not in self._names:
            self._give_back()
            return True
        self._begin(call[0], nested=True)
        self._emit(Arguments(self.count - 1, call[1]))
        self._drop(end)
        self._state = _State.AFTER
        return True

    def _arguments(self) -> bool:
        end = self._scan.end(self._buffer)
        written = self._buffer[:end]
        if written:
            self._emit(Arguments(self.count - 1, written))
        self._drop(len(written))
        if end is None:
            return False
        self._scan = ValueScan(depth=1)
        self._state = _State.REST if self._nested else _State.AFTER
        return True

    def _rest(self) -> bool:
        end = self._scan.end(self._buffer)
        self._drop(len(self._buffer[:end]))
        if end is None:
            return False
        self._state = _State.AFTER
        return True

    def _after(self) -> bool:
        stripped = self._buffer.lstrip()
        close = self._form.close
        self._lead = ""
        if close and stripped.startswith(close):
            self._buffer = stripped[len(close) :]
            self._list = False
            self._state = _State.TEXT
            return True
        if not stripped or (close and close.startswith(stripped)):
            self._buffer = "" if self._over else self._buffer
            return False
        if self._list and stripped.startswith((",", "]")):
            self._list = stripped[0] == ","
            self._buffer = stripped[1:]
            self._state = _State.BODY if self._list else _State.AFTER
            return True
        if stripped.startswith((";", "{")):
            skipped = stripped[0] == ";"
            self._lead = stripped[0] if skipped else ""
            self._buffer = stripped[skipped:]
            self._state = _State.BODY
            return True
        self._list = False
        self._state = _State.TEXT
        return True

    def _begin(self, name: str, *, nested: bool) -> None:
        """A call, whose arguments come next."""
        self.count += 1
        self._nested = nested
        self._lead = ""
        self._scan = ValueScan()
        self._state = _State.ARGUMENTS
        digest = hashlib.sha256(f"{self._seed}/{self.count}".encode()).hexdigest()
        self._emit(CallBegins(self.count - 1, digest[:CALL_ID_CHARS], name))

    def _take(self, length: int) -> None:
        self._lead += self._buffer[:length]
        self._buffer = self._buffer[length:]

    def _drop(self, length: int) -> None:
        self._buffer = self._buffer[length:]
        self._scan.moved(length)

    def _give_back(self) -> None:
        """No call: what was taken is content, and so is at least one character more, up to the next mark."""
        self._content(self._lead + self._buffer[:1])
        self._lead, self._buffer = "", self._buffer[1:]
        self._list = False
        self._state = _State.TEXT

    def _content(self, text: str) -> None:
        if text:
            self._emit(Content(text))

    def _emit(self, event: Event) -> None:
        if self._parallel or isinstance(event, Content) or event.index == 0:
            self._events.append(event)


def read_whole(reader: ToolCallReader, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the calls of a complete output."""
    return gathered([*reader.push(text), *reader.finish()])


def gathered(events: Iterable[Event]) -> tuple[str, tuple[ToolCall, ...]]:
    content: list[str] = []
    calls: list[ToolCall] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case CallBegins(_, call_id, name):
                calls.append(ToolCall(call_id, name, ""))
            case Arguments(_, text):
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + text)
    return "".join(content), tuple(calls)


def _call_in(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete object, if it is a call."""
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if isinstance(found.get("function"), dict):
        found = found["function"]
    name = found.get("name")
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return (name, arguments) if isinstance(name, str) and is_object(arguments) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def is_object(text: str) -> bool:
    """Whether this is a JSON object, and nothing around it."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


def _joined(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        match last, event:
            case Content(before), Content(text):
                found[-1] = Content(before + text)
            case Arguments(index, before), Arguments(same, text) if index == same:
                found[-1] = Arguments(index, before + text)
            case _:
                found.append(event)
    return found


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`, short of all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
