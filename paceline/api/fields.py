"""The types of single fields of what clients send: how each is read, and refused."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from paceline.types import MAX_LOGPROBS, MAX_PRIORITY

MAX_PROMPTS = 256
"""In one request."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content part that is text; the last two are those of /v1/responses."""


def refused(reason: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"reason": reason})


def only(*neutral: Any, instead: str = "") -> AfterValidator:
    """The field has no effect with these values (and null), and is refused with any other. `instead` is a remedy."""

    def check(value: Any) -> Any:
        if value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in neutral):
            return value
        raise refused(
            f"not supported; {instead or 'leave it out'} or send {' or '.join(map(json.dumps, (*neutral, None)))}"
        )

    return AfterValidator(check)


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text(content: Any) -> str:
    """A message's content; parts of type text are joined by line breaks, as other servers do."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise refused("must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise refused(f'part {index} is not {{"type": "text", "text": …}}; only text is supported')
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several: each a text or token ids."""
    several = isinstance(value, list) and any(isinstance(item, str | list) for item in value)
    if several and len(value) > MAX_PROMPTS:
        raise refused(f"at most {MAX_PROMPTS} prompts a request, got {len(value)}")
    return [_prompt(item) for item in value] if several else [_prompt(value)]


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("must be a string, a list of token ids, or a list of such")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise refused(f"token ids must be integers; entry {index} is not")
    return value


def _bias(value: Any) -> dict[int, float]:
    """Token id to bias; JSON's keys are strings."""
    if not isinstance(value, dict):
        raise refused("must be an object of token ids to numbers")
    found = {}
    for token, bias in value.items():
        if not str(token).isdecimal():
            raise refused(f"{token!r} is not a token id")
        found[int(token)] = bias
    return found


Ignored = Annotated[Any, Field(description="Accepted; it cannot change the result.")]
Content = Annotated[str, PlainValidator(_text, json_schema_input_type=str | list[dict[str, str]])]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]
Stop = Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])]

LogitBias = Annotated[dict[int, float], PlainValidator(_bias, json_schema_input_type=dict[str, float])]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


class Body(BaseModel):
    """Base: no coercion, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())
