"""The client's functions: what they are, how a model is told of them, and the grammar that holds it to them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from paceline.api.tool_forms import FORMS, Form, ParserName, form_of
from paceline.api.tool_parsing import ToolCallReader, is_object
from paceline.sessions.history import ChatMessage, ToolCall
from paceline.speculation.grammar_source import embedded
from paceline.types import Grammar

ToolChoice = Literal["none", "auto", "required"]

NO_PARAMETERS = '{"type": "object", "properties": {}}'

_PREAMBLE = """You may call these functions. Each line describes one, with its parameters as a JSON Schema:
<tools>
{tools}
</tools>
To call a function, write nothing but its name and arguments as JSON, in this form, once for each call:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>
The results come back in <tool_response>."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function a model may call. `parameters` is a JSON Schema as JSON text. With `strict` no call may break it."""

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS
    strict: bool = False

    def described(self) -> dict[str, Any]:
        """As chat templates expect it, which is OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": json.loads(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of one request, and whether one has to be called: any, or the one that is `named`."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = "auto"
    named: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """What the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def callable(self) -> tuple[Tool, ...]:
        """What it may call."""
        return tuple(tool for tool in self.offered if self.named in (None, tool.name))


def offered_json(use: ToolUse) -> str:
    """What the model is told of, as a session stores it; nothing if that is none."""
    return json.dumps([asdict(tool) for tool in use.offered]) if use.offered else ""


def as_json(value: Any) -> str:
    """As JSON text, for people and models to read."""
    return json.dumps(value, ensure_ascii=False)


def tools_from_json(text: str) -> tuple[Tool, ...]:
    return tuple(Tool(**fields) for fields in json.loads(text)) if text else ()


class ToolDialect:
    """How one model is told of functions, and how it calls them: by its chat template and its special tokens.

    `parser` overrides what these suggest.
    """

    def __init__(
        self,
        template: Any,
        vocabulary: Mapping[str, int],
        special_ids: Sequence[int] = (),
        parser: ParserName | Literal["auto"] = "auto",
    ) -> None:
        text = "\n".join(template.values()) if isinstance(template, Mapping) else template or ""
        self.native = re.search(r"\btools\b", text) is not None
        """Whether the template renders functions itself."""
        found = form_of(text, vocabulary, tools_in_template=self.native)
        self.form: Form = found if parser == "auto" else FORMS[parser]
        special = frozenset(special_ids)
        self._mark_id = vocabulary.get(self.form.mark) if vocabulary.get(self.form.mark) in special else None
        known = (vocabulary.get(mark) for mark in self.form.marks)
        self.shown_ids = tuple(token for token in known if token in special and token is not None)
        """Special tokens that an answer's text must show, because calls are found by them."""

    def reader(self, use: ToolUse, seed: str) -> ToolCallReader:
        """Finds the calls in one answer. The same seed gives the same ids."""
        return ToolCallReader(self.form, (tool.name for tool in use.callable), seed, parallel=use.parallel)

    def conversation(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """The messages as the template takes them; one that knows no tools gets them, calls and results in words."""
        if self.native:
            return [_native(message) for message in messages]
        plain = _in_words(messages)
        if not tools:
            return plain
        told = _PREAMBLE.format(tools="\n".join(json.dumps(tool.described(), ensure_ascii=False) for tool in tools))
        if plain[0]["role"] != "system":
            return [{"role": "system", "content": told}, *plain]
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
        return [first, *plain[1:]]

    def grammar(self, use: ToolUse, answer: Grammar | None = None) -> Grammar | None:
        """What the output has to be: calls where one is required; else `answer`, which is a JSON Schema, or calls, if
        there is an `answer`; else text with calls, which keep to their schemas if one of them is strict. None holds the
        model to nothing."""
        tools = use.callable
        if use.choice == "required" and tools:
            start = ["start: calls"]
        elif not tools or (answer is None and not any(tool.strict for tool in tools)):
            return answer
        elif answer is not None and (not self.form.mark or self.form.name == "llama3_json"):
            return self._one_object(tools, answer)
        elif answer is not None:
            start = ["start: answer | calls", f"answer: {embedded(json.loads(answer.source))}"]
        else:
            return self._between_text(tools, use.parallel)
        return self._lark(start, tools, use.parallel)

    def spelled(self, grammar: Grammar) -> Grammar:
        """The same grammar with the mark as text: one that compiles without knowing this tokenizer."""
        if self._mark_id is None:
            return grammar
        return replace(grammar, source=grammar.source.replace(f"<[{self._mark_id}]>", as_json(self.form.mark)))

    def _one_object(self, tools: Sequence[Tool], answer: Grammar) -> Grammar:
        """The answer or one call, where nothing but its keys tells a call from an answer: as one JSON Schema."""
        options, definitions = [], {}
        for n, schema in enumerate([answer.source, *(tool.parameters for tool in tools)]):
            place = f"schema_{n}"
            definitions[place] = _moved(json.loads(schema), f"#/$defs/{place}")
            inner = {"$ref": f"#/$defs/{place}"}
            options.append(inner if n == 0 else self._call_schema(tools[n - 1].name, inner))
        return Grammar("json_schema", json.dumps({"anyOf": options, "$defs": definitions}, ensure_ascii=False))

    def _call_schema(self, name: str, arguments: Any) -> dict[str, Any]:
        properties = {"name": {"const": name}, self.form.arguments: arguments}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def _between_text(self, tools: Sequence[Tool], parallel: bool) -> Grammar:
        """Text, in which calls may stand; without a mark, either one or the other."""
        if not self.form.mark or self.form.name == "llama3_json":
            return self._lark(["start: TEXT | calls", "TEXT: /([^{\\[](.|\\n)*)?/"], tools, parallel)
        lead = "lead: TEXT mark" if self._mark_id is not None else f"lead[lazy]: TEXT {as_json(self.form.mark)}"
        rules = [f"start: (lead body){'*' if parallel else '?'} TEXT", "TEXT: /(.|\\n)*/", lead]
        return self._lark(rules, tools, parallel)

    def _lark(self, rules: Sequence[str], tools: Sequence[Tool], parallel: bool) -> Grammar:
        more = "*" if parallel else "?"
        repeated = {
            "hermes": f'calls: mark body ("\\n" mark body){more}' if parallel else "calls: mark body",
            "mistral": "calls: mark body",
            "llama3_json": f'calls: body ("; " body){more}' if parallel else "calls: body",
            "json": "calls: body",
        }
        body = {
            "hermes": f'body: "\\n" call "\\n" {as_json(self.form.close)}',
            "mistral": f'body: "[" call (", " call){more} "]"' if parallel else 'body: "[" call "]"',
            "llama3_json": "body: call",
            "json": f'body: call | "[" call (", " call){more} "]"' if parallel else "body: call",
        }
        name = self.form.name
        mark = f"<[{self._mark_id}]>" if self._mark_id is not None else as_json(self.form.mark)
        lines = ["%llguidance {}", *rules]
        if not any(rule.startswith("lead") for rule in rules):
            lines.append(repeated[name])
        if self.form.mark and name != "llama3_json":
            lines.append(f"mark: {mark}")
        lines += [body[name], "call: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
        for n, tool in enumerate(tools):
            opening = f'{{"name": {json.dumps(tool.name)}, "{self.form.arguments}": '
            lines += [
                f'call_{n}: {as_json(opening)} arguments_{n} "}}"',
                f"arguments_{n}: {embedded(json.loads(tool.parameters))}",
            ]
        return Grammar("lark", "\n".join(lines) + "\n")


def _moved(schema: Any, place: str) -> Any:
    """A JSON Schema whose own references still hold when it is part of another, at `place`."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


def _native(message: ChatMessage) -> dict[str, Any]:
    """In the words of chat templates: arguments as an object, where they are one."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {"type": "function", "id": call.call_id, "function": {"name": call.name, "arguments": _object(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _in_words(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Calls and results as text. Neighbouring results are one message: many templates want users and answers to
    take turns."""
    found: list[dict[str, Any]] = []
    results = False
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if results:
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text})
        else:
            parts = [message.content] if message.content else []
            parts += [_call_in_words(call) for call in message.tool_calls]
            found.append({**_native(replace(message, tool_calls=())), "content": "\n".join(parts)})
        results = message.role == "tool"
    return found


def _call_in_words(call: ToolCall) -> str:
    written = json.dumps({"name": call.name, "arguments": _object(call)}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _object(call: ToolCall) -> Any:
    return json.loads(call.arguments) if is_object(call.arguments) else call.arguments
