"""Calls in what a model writes, whole and in any pieces."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.api.tool_forms import FORMS, ParserName, form_of
from paceline.api.tool_parsing import (
    Arguments,
    CallBegins,
    Content,
    Event,
    ToolCallReader,
    gathered,
    read_whole,
)

NAMES = ("weather", "get_time")
SUNNY = '{"city": "Oslo", "note": "a \\"}{\\" b"}'


def reader(form: ParserName = "hermes", **options: Any) -> ToolCallReader:
    return ToolCallReader(FORMS[form], NAMES, "seed", **options)


def read(form: ParserName, text: str, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    content, calls = read_whole(reader(form, **options), text)
    return content, [(call.name, call.arguments) for call in calls]


ONE = [("weather", SUNNY)]
TWO = [("weather", SUNNY), ("get_time", "{}")]


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {SUNNY}}}\n</tool_call>', "", ONE),
        ("hermes", f'Well.\n\n<tool_call>{{"name": "weather", "arguments": {SUNNY}}}</tool_call>\n', "Well.", ONE),
        (
            "hermes",
            f'<tool_call>{{"name": "weather", "arguments": {SUNNY}}}</tool_call>\n'
            '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>',
            "",
            TWO,
        ),
        ("hermes", f'<tool_call>{{"arguments": {SUNNY}, "name": "weather"}}</tool_call>', "", ONE),
        ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": 1}"}', "", [("get_time", '{"a": 1}')]),
        ("hermes", f'{{"name": "weather", "arguments": {SUNNY}}}', "", ONE),
        ("llama3_json", f'{{"name": "weather", "parameters": {SUNNY}}}', "", ONE),
        ("llama3_json", f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {SUNNY}}}', "", ONE),
        ("llama3_json", f'{{"name": "weather", "parameters": {SUNNY}}}; {{"name": "get_time"}}', "", TWO),
        ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {SUNNY}}}]', "", ONE),
        (
            "mistral",
            f'So: [TOOL_CALLS] [{{"name": "weather", "arguments": {SUNNY}}}, {{"name":"get_time","arguments":{{}}}}]',
            "So:",
            TWO,
        ),
        ("mistral", f"[TOOL_CALLS]weather[ARGS]{SUNNY}[TOOL_CALLS]get_time[CALL_ID]abc123[ARGS]{{}}", "", TWO),
        ("json", f'[{{"name": "weather", "arguments": {SUNNY}}}, {{"name": "get_time", "parameters": {{}}}}]', "", TWO),
        (
            "json",
            f'{{"type": "function", "id": "x", "function": {{"name": "weather", "arguments": {SUNNY}}}}}',
            "",
            ONE,
        ),
    ],
)
def test_calls_are_found_in_the_forms_of_the_common_models(
    form: ParserName, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, text) == (content, calls)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "Just words.",
        " \n",
        '{"answer": 42}',
        "[1, 2, 3]",
        "<tool_call>",
        "<tool_call>soon",
        '<tool_call>{"name": "unheard_of", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a"',
        "[TOOL_CALLS]",
        "[TOOL_CALLS]weather and so on",
        '{"name": "weather", "arguments": NaN}',
        "<|python_tag|>print(1)",
        "{" * 3000,
    ],
)
def test_what_is_no_call_is_content_as_it_was_written(form: ParserName, text: str) -> None:
    content, calls = read(form, text)
    assert content == text or calls == [("weather", '{"a"')]


def test_arguments_that_end_early_are_passed_on_as_far_as_they_go() -> None:
    assert read("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Os') == (
        "",
        [("weather", '{"city": "Os')],
    )


def test_a_call_streams_as_its_name_and_then_its_arguments() -> None:
    growing = reader()
    pieces = [
        "Hm",
        "m. <tool",
        '_call>{"name": "wea',
        'ther", "argu',
        'ments": {',
        '"city"',
        ': "Oslo"}',
        "}</tool_",
        "",
    ]
    events = [growing.push(piece) for piece in pieces] + [growing.finish()]
    call_id = next(event.call_id for event in chain.from_iterable(events) if isinstance(event, CallBegins))
    assert events == [
        [Content("Hm")],
        [Content("m.")],
        [],
        [],
        [CallBegins(0, call_id, "weather"), Arguments(0, "{")],
        [Arguments(0, '"city"')],
        [Arguments(0, ': "Oslo"}')],
        [],
        [],
        [],
    ]


def test_ids_are_letters_and_digits_and_the_same_when_the_output_is_read_again() -> None:
    text = '<tool_call>{"name": "get_time"}</tool_call><tool_call>{"name": "get_time"}</tool_call>'
    first, again = (read_whole(reader(), text)[1] for _ in range(2))
    ids = [call.call_id for call in first]
    assert first == again
    assert len(set(ids)) == 2
    assert all(len(name) == 9 and name.isalnum() for name in ids)


def test_without_parallel_calls_only_the_first_counts() -> None:
    text = '<tool_call>{"name": "get_time"}</tool_call> and <tool_call>{"name": "weather"}</tool_call>'
    assert read("hermes", text, parallel=False) == (" and", [("get_time", "{}")])


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        '{"name": "weather", "arguments": ',
        '{"name": "weather", "parameters": {"a": "}"}}',
        '{"arguments": {"b": [1]}, "name": "get_time"}',
        "weather",
        '"name"',
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        ":",
        '"',
        "\\",
        " ",
        "\n",
        "<",
        "é",
        "text",
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=30))


@given(st.sampled_from(sorted(FORMS)), TEXTS, st.lists(st.integers(0, 200), max_size=30), st.booleans())
def test_any_cut_of_any_text_gives_the_same_calls_as_the_whole(
    form: ParserName, text: str, cuts: list[int], parallel: bool
) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    growing = reader(form, parallel=parallel)
    events: list[Event] = []
    for start, end in pairwise(places):
        events += growing.push(text[start:end])
    events += growing.finish()
    assert gathered(events) == read_whole(reader(form, parallel=parallel), text)


@given(st.sampled_from(sorted(FORMS)), TEXTS)
def test_no_text_raises_and_one_without_a_call_loses_nothing(form: ParserName, text: str) -> None:
    content, calls = read(form, text)
    assert calls or content == text


@given(
    st.sampled_from(sorted(FORMS)),
    st.dictionaries(st.text(max_size=5), st.recursive(st.text(max_size=5) | st.integers(), st.lists, max_leaves=5)),
    st.integers(1, 7),
)
def test_any_arguments_come_out_as_they_were_written(form: ParserName, arguments: dict[str, Any], step: int) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    key = FORMS[form].arguments
    text = f'{FORMS[form].mark}{{"name": "weather", "{key}": {written}}}{FORMS[form].close}'
    growing = reader(form)
    events: list[Event] = []
    for start in range(0, len(text), step):
        events += growing.push(text[start : start + step])
    assert gathered([*events, *growing.finish()])[1][0].arguments == written


@pytest.mark.parametrize(
    ("template", "vocabulary", "form"),
    [
        ("{{ tools }}<tool_call>", (), "hermes"),
        ("{{ tools }}", ("<|python_tag|>",), "llama3_json"),
        ("{{ tools }}[TOOL_CALLS]", (), "mistral"),
        ("{{ tools }}", (), "json"),
    ],
)
def test_the_form_is_read_from_the_template_or_the_special_tokens(
    template: str, vocabulary: tuple[str, ...], form: str
) -> None:
    assert form_of(template, vocabulary, tools_in_template=True).name == form


def test_a_template_without_tools_gets_hermes_form() -> None:
    assert form_of("{{ messages }}", ("[TOOL_CALLS]",), tools_in_template=False).name == "hermes"
