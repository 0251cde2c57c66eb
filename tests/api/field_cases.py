"""What each field of a request does, as cases that tests run; the table of supported fields is made from them alone.

A field is *supported* if a case shows its effect, *accepted* if one shows that it has none, *refused* if one shows its
refusal. `python -m tests.api.field_cases` writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.types import Grammar
from tests.api.scripted import CHAT, COMPLETION, MODEL

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "openai-fields.md"

CHATS, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {CHATS: CHAT, COMPLETIONS: COMPLETION, RESPONSES: {"model": MODEL, "input": "hi"}}

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
RESPONSE_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
SCHEMA = {"name": "x", "schema": {"type": "null"}}
NULL = Grammar("json_schema", '{"type": "null"}')
BY_PRIORITY = "extension; with target.engine.scheduling_policy: priority"
PREVIOUS = "(the id of a response before)"


@dataclass(frozen=True)
class Seen:
    """The field changes something: `path` of the request a replica gets, of the answer, of its events, of its headers,
    or of the prompt's text is `expected` (or fulfils it), and is not without the field."""

    endpoint: str
    field: str
    value: Any
    where: str
    expected: Any
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    differs: bool = True


@dataclass(frozen=True)
class Idle:
    """With this value the field changes nothing."""

    endpoint: str
    field: str
    value: Any
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """With this value the request is refused, naming the field."""

    endpoint: str
    field: str
    value: Any
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


Case = Seen | Idle | Refused


def holds(text: str) -> Callable[[Any], bool]:
    return lambda found: text in str(found)


def _params(endpoint: str, *pairs: tuple[str, Any, str]) -> list[Case]:
    """Fields that are sampling parameters by the same name."""
    return [Seen(endpoint, name, value, f"request.params.{name}", value, note) for name, value, note in pairs]


_BOTH: list[tuple[str, Any, str]] = [
    ("temperature", 0.5, "0 is greedy"),
    ("top_p", 0.5, ""),
    ("seed", 4, "fixes the output for all time"),
    ("max_tokens", 3, ""),
    ("n", 2, "at most 128"),
    ("presence_penalty", 0.5, ""),
    ("frequency_penalty", 0.5, ""),
    ("top_k", 5, "extension"),
    ("min_p", 0.1, "extension"),
    ("repetition_penalty", 1.5, "extension"),
    ("min_tokens", 1, "extension"),
    ("ignore_eos", True, "extension"),
    ("include_stop_str_in_output", True, "extension"),
]

_IGNORED_BY_BOTH: list[tuple[str, Any]] = [
    ("user", "u"),
    ("metadata", {"a": "b"}),
    ("store", True),
    ("service_tier", "flex"),
    ("safety_identifier", "s"),
    ("prompt_cache_key", "k"),
    ("prompt_cache_options", {}),
    ("prompt_cache_retention", "24h"),
    ("spaces_between_special_tokens", False),
]


def _shared(endpoint: str) -> list[Case]:
    """Of chat and text completions."""
    return [
        Seen(endpoint, "model", MODEL, "answer.model", MODEL, "the model served, or nothing", differs=False),
        Refused(endpoint, "model", "other"),
        *_params(endpoint, *_BOTH),
        Seen(endpoint, "stop", "end", "request.params.stop", ("end",), "one string, or up to 16"),
        Seen(endpoint, "stop_token_ids", [9], "request.params.stop_token_ids", (9,), "extension"),
        Seen(endpoint, "logit_bias", {"5": 1}, "request.params.logit_bias", ((5, 1.0),)),
        Seen(endpoint, "stream", True, "headers.content-type", "text/event-stream; charset=utf-8"),
        Seen(
            endpoint,
            "stream_options",
            {"include_usage": True},
            "events.-2.usage.total_tokens",
            7,
            "`include_usage`; `include_obfuscation` has no effect",
            {"stream": True},
        ),
        Seen(
            endpoint,
            "response_format",
            {"type": "json_schema", "json_schema": SCHEMA},
            "request.params.grammar",
            NULL,
            "text, json_object, json_schema; the output keeps to the schema, strict or not",
        ),
        Refused(endpoint, "response_format", {"type": "xml"}),
        Seen(
            endpoint,
            "structured_outputs",
            {"regex": "a+"},
            "request.params.grammar",
            Grammar("regex", "a+"),
            "extension; json, regex, choice, grammar (Lark), json_object",
        ),
        Seen(endpoint, "session_id", "s", "request.session_id", "s", "extension"),
        Seen(endpoint, "speculation", False, "request.speculate", False, "extension"),
        Seen(endpoint, "ctx_size", 64, "request.params.ctx_size", 64, "extension; needs a model whose text can grow"),
        Seen(endpoint, "n_keep", 2, "request.params.n_keep", 2, "extension", {"ctx_size": 64}),
        Seen(endpoint, "n_discard", 8, "request.params.n_discard", 8, "extension", {"ctx_size": 64}),
        Seen(endpoint, "priority", 3, "request.priority", 3, BY_PRIORITY),
        Seen(endpoint, "return_token_ids", True, "answer.paceline.token_ids", [10, 11, 12], "extension"),
        *(Idle(endpoint, name, value) for name, value in _IGNORED_BY_BOTH),
        *_off(endpoint, "skip_special_tokens", True, False),
        *_off(endpoint, "detokenize", True, False),
        *_off(endpoint, "use_beam_search", False, True),
        *_off(endpoint, "length_penalty", 1.0, 2.0),
        *_off(endpoint, "allowed_token_ids", [], [1]),
        *_off(endpoint, "bad_words", [], ["a"]),
        *_off(endpoint, "truncate_prompt_tokens", None, 5),
        *_off(endpoint, "add_special_tokens", None, True),
        *(
            Refused(endpoint, f"guided_{kind}", value, f"use structured_outputs.{kind}")
            for kind, value in (("json", {}), ("regex", "a"), ("choice", ["a"]), ("grammar", "a"))
        ),
    ]


def _off(endpoint: str, name: str, neutral: Any, other: Any, note: str = "") -> list[Case]:
    """A field of which only the value that means "off" is taken."""
    return [Idle(endpoint, name, neutral, note), Refused(endpoint, name, other)]


_CHAT: list[Case] = [
    *_shared(CHATS),
    Seen(
        CHATS,
        "messages",
        [{"role": "user", "content": "other"}],
        "prompt",
        holds("other"),
        "roles system, developer, user, assistant and tool; text only",
    ),
    Seen(CHATS, "max_completion_tokens", 3, "request.params.max_tokens", 3, "the later word for max_tokens"),
    Seen(CHATS, "logprobs", True, "request.params.logprobs", 0),
    Seen(CHATS, "top_logprobs", 2, "request.params.logprobs", 2, "0 to 20; with logprobs", {"logprobs": True}),
    Seen(CHATS, "tools", [TOOL], "prompt", holds('"name": "f"'), "functions; `strict` holds calls to their schema"),
    Refused(CHATS, "tools", [{"type": "custom", "custom": {"name": "f"}}]),
    Seen(
        CHATS,
        "tool_choice",
        "required",
        "request.params.grammar.kind",
        "lark",
        "none, auto, required, or a named function",
        {"tools": [TOOL]},
    ),
    Refused(CHATS, "tool_choice", {"type": "allowed_tools"}, more={"tools": [TOOL]}),
    Seen(
        CHATS,
        "parallel_tool_calls",
        False,
        "request.params.grammar.source",
        lambda source: '("\\n" mark body)*' not in source,
        "false: at most one call",
        {"tools": [TOOL], "tool_choice": "required"},
    ),
    *_off(CHATS, "functions", [], [{"name": "f"}], "use tools"),
    *_off(CHATS, "function_call", "none", {"name": "f"}, "use tool_choice"),
    *_off(CHATS, "modalities", ["text"], ["text", "audio"]),
    *_off(CHATS, "audio", None, {"voice": "a"}),
    *_off(CHATS, "moderation", None, {"model": "m"}),
    *_off(CHATS, "reasoning_effort", "none", "high"),
    *_off(CHATS, "verbosity", None, "low"),
    *_off(CHATS, "web_search_options", None, {}),
    Idle(CHATS, "prediction", {"type": "content", "content": "x"}, "drafts come from the drafters"),
    *_off(CHATS, "add_generation_prompt", True, False),
    *_off(CHATS, "continue_final_message", False, True),
    *_off(CHATS, "chat_template", None, "x"),
    *_off(CHATS, "chat_template_kwargs", {}, {"enable_thinking": True}),
    *_off(CHATS, "documents", [], [{}]),
]

_COMPLETION: list[Case] = [
    *_shared(COMPLETIONS),
    Seen(COMPLETIONS, "prompt", ["a", "b"], "answer.choices.-1.index", 1, "text or token ids, one or up to 256"),
    Seen(COMPLETIONS, "echo", True, "answer.choices.0.text", "hiHello", "in logprobs too"),
    Seen(COMPLETIONS, "logprobs", 2, "request.params.logprobs", 2, "0 to 20"),
    Seen(COMPLETIONS, "prompt_logprobs", 2, "request.params.prompt_logprobs", 2, "extension"),
    *_off(COMPLETIONS, "best_of", 1, 2, "only n"),
    *_off(COMPLETIONS, "suffix", "", "end"),
]

_RESPONSE: list[Case] = [
    Seen(RESPONSES, "model", MODEL, "answer.model", MODEL, "the model served, or nothing", differs=False),
    Refused(RESPONSES, "model", "other"),
    Seen(
        RESPONSES,
        "input",
        [{"role": "user", "content": "other"}],
        "prompt",
        holds("other"),
        "text, or items: message, function_call, function_call_output",
    ),
    Seen(RESPONSES, "instructions", "Be kind.", "prompt", holds("Be kind.")),
    Seen(
        RESPONSES,
        "previous_response_id",
        PREVIOUS,
        "prompt",
        lambda text: text.count("<|user|>") == 2,
        "any that is stored",
    ),
    Refused(RESPONSES, "previous_response_id", "resp_unknown"),
    Seen(RESPONSES, "store", False, "request.session_id", None),
    Seen(RESPONSES, "max_output_tokens", 3, "request.params.max_tokens", 3),
    *_params(RESPONSES, ("temperature", 0.5, "0 is greedy"), ("top_p", 0.5, "")),
    Seen(
        RESPONSES,
        "text",
        {"format": {"type": "json_schema", **SCHEMA}},
        "request.params.grammar",
        NULL,
        "`format` as response_format of a chat; `verbosity` only medium",
    ),
    Seen(RESPONSES, "tools", [RESPONSE_TOOL], "prompt", holds('"name": "f"'), "functions"),
    Refused(RESPONSES, "tools", [{"type": "web_search"}]),
    Seen(
        RESPONSES,
        "tool_choice",
        "required",
        "request.params.grammar.kind",
        "lark",
        "none, auto, required, or a named function",
        {"tools": [RESPONSE_TOOL]},
    ),
    Seen(
        RESPONSES,
        "parallel_tool_calls",
        False,
        "request.params.grammar.source",
        lambda source: '("\\n" mark body)*' not in source,
        "false: at most one call",
        {"tools": [RESPONSE_TOOL], "tool_choice": "required"},
    ),
    Seen(
        RESPONSES,
        "include",
        ["message.output_text.logprobs"],
        "request.params.logprobs",
        0,
        "message.output_text.logprobs alone",
    ),
    Refused(RESPONSES, "include", ["reasoning.encrypted_content"]),
    Seen(
        RESPONSES,
        "top_logprobs",
        2,
        "request.params.logprobs",
        2,
        "0 to 20",
        {"include": ["message.output_text.logprobs"]},
    ),
    Seen(RESPONSES, "metadata", {"a": "b"}, "answer.metadata", {"a": "b"}, "kept and sent back"),
    Seen(RESPONSES, "stream", True, "headers.content-type", "text/event-stream; charset=utf-8"),
    Seen(RESPONSES, "seed", 4, "request.params.seed", 4, "extension"),
    Seen(RESPONSES, "stop", "end", "request.params.stop", ("end",), "extension"),
    Seen(RESPONSES, "top_k", 5, "request.params.top_k", 5, "extension"),
    Seen(RESPONSES, "min_p", 0.1, "request.params.min_p", 0.1, "extension"),
    Seen(RESPONSES, "speculation", False, "request.speculate", False, "extension"),
    Seen(RESPONSES, "priority", 3, "request.priority", 3, BY_PRIORITY),
    Idle(RESPONSES, "stream_options", {"include_obfuscation": True}, "only with stream", {"stream": True}),
    *_off(RESPONSES, "background", False, True),
    *_off(RESPONSES, "background_options", None, {}),
    *_off(RESPONSES, "conversation", None, "conv_1", "use previous_response_id"),
    *_off(RESPONSES, "context_management", [], [{}]),
    *_off(RESPONSES, "truncation", "disabled", "auto"),
    *_off(RESPONSES, "prompt", None, {"id": "p"}),
    *_off(RESPONSES, "reasoning", {}, {"effort": "high"}),
    *_off(RESPONSES, "moderation", None, {"model": "m"}),
    *_off(RESPONSES, "access_programs", [], [{}]),
    *_off(RESPONSES, "image", None, {}),
    Idle(RESPONSES, "max_tool_calls", 3, "there are no built-in tools"),
    Idle(RESPONSES, "user", "u"),
    Idle(RESPONSES, "service_tier", "flex"),
    Idle(RESPONSES, "safety_identifier", "s"),
    Idle(RESPONSES, "prompt_cache_key", "k"),
    Idle(RESPONSES, "prompt_cache_options", {}),
    Idle(RESPONSES, "prompt_cache_retention", "24h"),
]

CASES: list[Case] = [*_CHAT, *_COMPLETION, *_RESPONSE]


def status(cases: list[Case]) -> str:
    """In a word, of one field; as far as its cases show."""
    if any(isinstance(case, Seen) for case in cases):
        return "supported"
    if not any(isinstance(case, Refused) for case in cases):
        return "accepted, without effect"
    neutral = next((case for case in cases if isinstance(case, Idle)), None)
    return "refused" if neutral is None or neutral.value is None else f"refused, unless `{json.dumps(neutral.value)}`"


def table() -> str:
    """The document."""
    lines = [
        "<!-- Generated by `python -m tests.api.field_cases` from the cases of the tests. Do not edit. -->",
        "# OpenAI's fields",
        "",
        "What becomes of each field of a request. *Supported* fields have a test that shows their effect, *accepted*",
        "ones a test that shows that they have none; *refused* ones get status 400 with the field's name, as does any",
        "field that is not listed. Null is as good as leaving a field out.",
    ]
    for endpoint in BODIES:
        lines += ["", f"## {endpoint}", "", "| Field | Status | Note |", "| --- | --- | --- |"]
        for name in dict.fromkeys(case.field for case in CASES if case.endpoint == endpoint):
            cases = [case for case in CASES if (case.endpoint, case.field) == (endpoint, name)]
            note = next((case.note for case in cases if case.note), "")
            lines.append(f"| `{name}` | {status(cases)} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(table())
