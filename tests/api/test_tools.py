"""How a model is told of functions, and the grammars that hold it to them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerFast

from paceline.api.tool_forms import FORMS, ParserName
from paceline.api.tool_parsing import read_whole
from paceline.api.tools import Tool, ToolDialect, ToolUse, offered_json, tools_from_json
from paceline.speculation.grammar_check import check_grammar
from paceline.types import Grammar
from tests.api.scripted import tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo", "Rome"]}},
}
WEATHER = Tool("weather", "", json.dumps(SCHEMA), strict=True)
CLOCK = Tool("clock", "", '{"type": "object", "properties": {}, "additionalProperties": false}')
USE = ToolUse((WEATHER, CLOCK))
ANSWER = Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}')


@cache
def marked() -> PreTrainedTokenizerFast:
    """With Mistral's mark among its special tokens."""
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    words.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["[TOOL_CALLS]"]})
    return words


@cache
def compiled_for() -> LLTokenizer:
    return llguidance.hf.from_tokenizer(marked())


def dialect(form: ParserName) -> ToolDialect:
    return ToolDialect("{{ tools }}", marked().get_vocab(), marked().all_special_ids, form)


def takes(grammar: Grammar | None, text: str, *, whole: bool = True) -> bool:
    """Whether the grammar takes a text; `whole`, and lets it end there."""
    assert grammar is not None
    source = LLMatcher.grammar_from_json_schema if grammar.kind == "json_schema" else LLMatcher.grammar_from_lark
    matcher = LLMatcher(compiled_for(), source(grammar.source))
    assert not matcher.get_error()
    tokens = marked().encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and (not whole or matcher.is_accepting())


def written(form: ParserName, *calls: tuple[str, str]) -> str:
    """Calls as the grammars of this form want them."""
    key = FORMS[form].arguments
    objects = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)
    if form == "mistral":
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    if form == "llama3_json":
        return "; ".join(objects)
    return objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]"


FORM = pytest.mark.parametrize("form", FORMS)
OSLO = ("weather", '{"city": "Oslo"}')


@FORM
def test_a_required_call_keeps_to_the_schema_of_its_function(form: ParserName) -> None:
    grammar = dialect(form).grammar(ToolUse(USE.tools, "required"))
    assert takes(grammar, written(form, OSLO))
    assert takes(grammar, written(form, OSLO, ("clock", "{}")))
    assert not takes(grammar, written(form, ("weather", '{"city": "Bonn"}')), whole=False)
    assert not takes(grammar, "No.", whole=False)
    assert not takes(grammar, "")


@FORM
def test_what_a_grammar_of_calls_takes_is_read_as_these_calls(form: ParserName) -> None:
    found = dialect(form).reader(USE, "seed")
    _, calls = read_whole(found, written(form, OSLO, ("clock", "{}")))
    assert [(call.name, call.arguments) for call in calls] == [OSLO, ("clock", "{}")]


@FORM
def test_a_named_function_is_the_only_one_and_called_once(form: ParserName) -> None:
    grammar = dialect(form).grammar(ToolUse(USE.tools, "required", "clock", parallel=False))
    assert takes(grammar, written(form, ("clock", "{}")))
    assert not takes(grammar, written(form, OSLO), whole=False)
    assert not takes(grammar, written(form, ("clock", "{}"), ("clock", "{}")), whole=False)


@FORM
def test_a_strict_function_lets_the_model_write_text_or_a_call_that_keeps_to_its_schema(form: ParserName) -> None:
    grammar = dialect(form).grammar(USE)
    assert takes(grammar, "Just words: 1 < 2.")
    assert takes(grammar, written(form, OSLO))
    assert not takes(grammar, written(form, ("weather", '{"city": "Bonn"}')), whole=False)


@pytest.mark.parametrize("form", ["hermes", "mistral"])
def test_text_may_stand_before_a_marked_call(form: ParserName) -> None:
    assert takes(dialect(form).grammar(USE), f"Let me see.\n{written(form, OSLO)}")


@FORM
def test_with_a_format_of_the_answer_it_is_that_or_calls(form: ParserName) -> None:
    grammar = dialect(form).grammar(ToolUse((CLOCK, WEATHER)), ANSWER)
    assert takes(grammar, '{"a": null}')
    assert takes(grammar, written(form, ("clock", "{}")))
    assert takes(grammar, written(form, OSLO))
    assert not takes(grammar, written(form, ("weather", '{"city": "Bonn"}')), whole=False)
    assert not takes(grammar, "Words.", whole=False)


@FORM
@pytest.mark.parametrize(
    ("use", "answer"),
    [(ToolUse(USE.tools, "required"), None), (USE, None), (ToolUse((CLOCK, WEATHER)), ANSWER)],
    ids=["required", "strict", "answer"],
)
def test_every_grammar_passes_the_check_at_the_edge(form: ParserName, use: ToolUse, answer: Grammar | None) -> None:
    grammar = dialect(form).grammar(use, answer)
    assert grammar is not None
    check_grammar(dialect(form).spelled(grammar))


@FORM
def test_functions_that_are_not_strict_hold_nothing_to_a_grammar(form: ParserName) -> None:
    assert dialect(form).grammar(ToolUse((CLOCK,))) is None


@FORM
def test_without_functions_the_format_of_the_answer_is_all_there_is(form: ParserName) -> None:
    assert dialect(form).grammar(ToolUse(USE.tools, "none"), ANSWER) == ANSWER


def test_functions_survive_being_stored() -> None:
    assert tools_from_json(offered_json(USE)) == USE.tools
    assert tools_from_json(offered_json(ToolUse())) == ()


def test_a_template_of_several_names_knows_tools_if_one_does() -> None:
    templates: Any = {"default": "{{ messages }}", "tool_use": "{{ tools }}<tool_call>"}
    found = ToolDialect(templates, {})
    assert (found.native, found.form.name) == (True, "hermes")


def test_a_model_without_a_template_has_a_form_all_the_same() -> None:
    assert ToolDialect(None, {}).form.name == "hermes"
