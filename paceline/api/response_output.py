"""The output of a response as it grows: items, and the events that tell of each step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.api.answers import ChatTokenLogprob
from paceline.api.answers_responses import FunctionCall, OutputItem, OutputMessage, OutputText, ResponseEvent, Status
from paceline.api.tool_parsing import Arguments, CallBegins, Content, Event


@dataclass
class _Item:
    """A message, or with a `call_id` a call."""

    id: str
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[ChatTokenLogprob] = field(default_factory=list)

    def answer(self, status: Status) -> OutputItem:
        if self.call_id:
            return FunctionCall(id=self.id, call_id=self.call_id, name=self.name, arguments=self.text, status=status)
        content = [] if status == "in_progress" else [self.part()]
        return OutputMessage(id=self.id, status=status, content=content)

    def part(self) -> OutputText:
        return OutputText(text=self.text, logprobs=self.logprobs)


class Output:
    """Of the response `response_id`. Items have ids of their own, the same whenever the output is read again."""

    def __init__(self, response_id: str) -> None:
        self._suffix = response_id.removeprefix("resp_")
        self._items: list[_Item] = []
        self._open = False
        self._sent = 0

    def event(self, kind: str, **fields: Any) -> ResponseEvent:
        """The next event."""
        self._sent += 1
        return ResponseEvent(type=kind, sequence_number=self._sent - 1, **fields)

    def grow(self, events: Iterable[Event], logprobs: Sequence[ChatTokenLogprob] = ()) -> list[ResponseEvent]:
        """With more of the output. Log probabilities belong to the text, if there is any."""
        told: list[ResponseEvent] = []
        for event in events:
            match event:
                case Content(text):
                    told += self._message() if not self._open or self._items[-1].call_id else []
                    told.append(self._more(text, logprobs))
                    logprobs = ()
                case CallBegins(_, call_id, name):
                    told += self._close("completed")
                    told += self._begin(_Item(f"fc_{self._suffix}{len(self._items)}", call_id, name))
                case Arguments(_, text):
                    told.append(self._more(text, ()))
        return told

    def finish(self, *, cut: bool) -> list[ResponseEvent]:
        """At the end of the output; `cut` if a limit was. An output without anything is an empty message."""
        told = [] if self._items else self._message()
        return told + self._close("incomplete" if cut else "completed")

    def items(self, *, cut: bool) -> list[OutputItem]:
        """All of them, complete but for the last if the output was cut."""
        last = self._items[-1] if self._items else None
        return [item.answer("incomplete" if cut and item is last else "completed") for item in self._items]

    def _message(self) -> list[ResponseEvent]:
        told = self._close("completed")
        told += self._begin(_Item(f"msg_{self._suffix}{len(self._items)}"))
        return [*told, self._of_item("response.content_part.added", content_index=0, part=OutputText(text=""))]

    def _begin(self, item: _Item) -> list[ResponseEvent]:
        self._items.append(item)
        self._open = True
        place = len(self._items) - 1
        return [self.event("response.output_item.added", output_index=place, item=item.answer("in_progress"))]

    def _more(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> ResponseEvent:
        item = self._items[-1]
        item.text += text
        item.logprobs += logprobs
        if item.call_id:
            return self._of_item("response.function_call_arguments.delta", delta=text)
        return self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))

    def _close(self, status: Status) -> list[ResponseEvent]:
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        if item.call_id:
            told = [
                self._of_item("response.function_call_arguments.done", arguments=item.text, name=item.name),
            ]
        else:
            text = {"text": item.text, "logprobs": item.logprobs}
            told = [
                self._of_item("response.output_text.done", content_index=0, **text),
                self._of_item("response.content_part.done", content_index=0, part=item.part()),
            ]
        place = len(self._items) - 1
        return [*told, self.event("response.output_item.done", output_index=place, item=item.answer(status))]

    def _of_item(self, kind: str, **fields: Any) -> ResponseEvent:
        return self.event(kind, item_id=self._items[-1].id, output_index=len(self._items) - 1, **fields)
