"""The forms in which models write calls of functions.

hermes        text <tool_call>{"name": …, "arguments": {…}}</tool_call> <tool_call>…        Hermes, Qwen, SmolLM3
llama3_json   {"name": …, "parameters": {…}}; {…}          or behind <|python_tag|>         Llama 3.x
mistral       text [TOOL_CALLS][{"name": …, "arguments": {…}}, …]   or [TOOL_CALLS]name[ARGS]{…}
json          {"name": …, "arguments": {…}}  or a list of such
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

ParserName = Literal["hermes", "llama3_json", "mistral", "json"]


@dataclass(frozen=True, slots=True)
class Form:
    """How a family of models writes its calls: the marks around them, and the key of the arguments."""

    name: ParserName
    mark: str = ""
    close: str = ""
    arguments: Literal["arguments", "parameters"] = "arguments"

    @property
    def marks(self) -> tuple[str, ...]:
        """The special words that must reach the text."""
        return (self.mark, "[ARGS]", "[CALL_ID]") if self.name == "mistral" else (self.mark,) if self.mark else ()


FORMS: dict[ParserName, Form] = {
    "hermes": Form("hermes", "<tool_call>", "</tool_call>"),
    "llama3_json": Form("llama3_json", "<|python_tag|>", arguments="parameters"),
    "mistral": Form("mistral", "[TOOL_CALLS]"),
    "json": Form("json"),
}


def form_of(template: str, vocabulary: Container[str], *, tools_in_template: bool) -> Form:
    """The form a model was taught, by the marks in its chat template or among its special tokens.

    A template that knows no tools gets Hermes' form, in which Paceline then describes them itself.
    """
    if not tools_in_template:
        return FORMS["hermes"]
    for form in FORMS.values():
        if form.mark and form.mark in template:
            return form
    taught = (form for form in FORMS.values() if form.mark in ("[TOOL_CALLS]", "<|python_tag|>"))
    return next((form for form in taught if form.mark in vocabulary), FORMS["json"])
