"""Functions of the client over HTTP: told to the model, called by it, answered by the client."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from paceline.errors import InvalidRequest
from paceline.sessions.store import MemoryStore
from paceline.types import Delta, FinishReason, Grammar
from tests.api.scripted import ACCEPTED, CHAT, ScriptedTargets, events, http, tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = {**CHAT, "tools": [WEATHER, CLOCK]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def says(*texts: str, reason: FinishReason = FinishReason.STOP) -> ScriptedTargets:
    """A replica that answers with these deltas."""
    last = len(texts) - 1
    deltas = [Delta((10 + n,), text, reason if n == last else None) for n, text in enumerate(texts)]
    return ScriptedTargets([ACCEPTED, *deltas])


@cache
def with_tools(mark: str = "<tool_call>") -> PreTrainedTokenizerFast:
    """A tokenizer whose template knows tools, and whose mark of a call is a special token."""
    words: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    words.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": [mark]})
    words.chat_template = (
        "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.tool_calls %}" + mark + "{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}"
        "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}<|assistant|>"
    )
    return words


async def post(body: dict[str, Any], targets: ScriptedTargets, path: str = "/v1/chat/completions", **opt: Any) -> Any:
    async with http(targets, context=4096, **opt) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


def prompt_of(targets: ScriptedTargets, words: PreTrainedTokenizerFast | None = None) -> str:
    text: str = (words or tokenizer()).decode(targets.requests[-1].token_ids)
    return text


async def test_a_call_is_in_the_message_and_is_the_reason_of_the_end() -> None:
    choice = (await post(ASKED, says("Let me see. ", CALL)))["choices"][0]
    calls = choice["message"].pop("tool_calls")
    assert calls[0].pop("id").isalnum()
    assert choice["message"] == {"role": "assistant", "content": "Let me see."}
    assert calls == [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    assert choice["finish_reason"] == "tool_calls"


async def test_the_content_beside_calls_alone_is_null() -> None:
    message = (await post(ASKED, says(CALL)))["choices"][0]["message"]
    assert message["content"] is None


async def test_a_streamed_call_is_its_name_then_its_arguments_then_the_reason() -> None:
    pieces = ("Hm. <tool_", 'call>{"name": "weather", "arg', 'uments": {"city": ', '"Oslo"}', "}</tool_call>")
    *chunks, done = await post({**ASKED, "stream": True}, says(*pieces))
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = [choice["delta"] for choice in choices]
    call_id = deltas[2]["tool_calls"][0].pop("id")
    assert done == "[DONE]"
    assert call_id.isalnum()
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Hm."},
        {"tool_calls": [{"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
        {},
    ]
    assert [choice.get("finish_reason") for choice in choices] == [None] * 5 + ["tool_calls"]


async def test_streamed_and_whole_calls_have_the_same_ids() -> None:
    targets = says(CALL, f"\n{CALL}")
    chunks = await post({**ASKED, "stream": True}, targets)
    ids = [call["id"] for c in chunks[:-1] for call in c["choices"][0]["delta"].get("tool_calls", ()) if "id" in call]
    assert len(set(ids)) == 2


async def test_a_call_cut_off_by_the_limit_ends_with_length() -> None:
    choice = (await post(ASKED, says(CALL[:40], CALL[40:60], reason=FinishReason.LENGTH)))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == CALL[CALL.index('{"city"') : 60]


@pytest.mark.parametrize("more", [{"tools": []}, {"tool_choice": "none"}])
async def test_without_functions_to_call_nothing_is_taken_for_a_call(more: dict[str, Any]) -> None:
    choice = (await post({**ASKED, **more}, says(CALL)))["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": CALL}, "stop")


async def test_each_choice_has_its_own_calls() -> None:
    script = [ACCEPTED, *(Delta((n,), CALL, FinishReason.STOP, index=n) for n in range(2))]
    choices = (await post({**ASKED, "n": 2}, ScriptedTargets(script)))["choices"]
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 2


async def test_parallel_calls_can_be_switched_off() -> None:
    choice = (await post({**ASKED, "parallel_tool_calls": False}, says(CALL, CALL)))["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_a_template_that_knows_tools_is_given_them() -> None:
    targets, words = says("ok"), with_tools()
    await post(ASKED, targets, tokenizer=words)
    told = json.loads(prompt_of(targets, words).removeprefix("T").partition("<|user|>")[0])
    assert [tool["function"]["name"] for tool in told] == ["weather", "clock"]
    assert told[0]["function"]["parameters"] == WEATHER["function"]["parameters"]  # type: ignore[index]


async def test_a_template_that_does_not_is_told_in_a_system_message() -> None:
    targets = says("ok")
    await post({**ASKED, "messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]}, targets)
    prompt = prompt_of(targets)
    assert prompt.startswith("<|system|>Be kind.\n\nYou may call")
    assert '"name": "weather"' in prompt
    assert "<tool_call>" in prompt


CONVERSATION = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abc", "content": "rain"},
]


async def test_calls_and_results_reach_a_template_that_knows_tools() -> None:
    targets, words = says("ok"), with_tools()
    await post({"messages": CONVERSATION}, targets, tokenizer=words)
    expected = '<|user|>Weather?<|assistant|><tool_call>{"city": "Oslo"}<|tool|>rain#abc<|assistant|>'
    assert prompt_of(targets, words) == expected


async def test_calls_and_results_are_written_out_for_one_that_does_not() -> None:
    targets = says("ok")
    results = [CONVERSATION[-1], {**CONVERSATION[-1], "content": "wind"}]
    await post({"messages": [*CONVERSATION[:-1], *results]}, targets)
    assert prompt_of(targets) == (
        '<|user|>Weather?<|assistant|><tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        "<|user|><tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response><|assistant|>"
    )


async def test_a_special_mark_reaches_the_text_if_there_are_functions() -> None:
    words, targets = with_tools("[TOOL_CALLS]"), says('[TOOL_CALLS][{"name": "clock", "arguments": {}}]')
    answer = await post(ASKED, targets, tokenizer=words)
    assert targets.requests[0].params.shown_token_ids == (words.convert_tokens_to_ids("[TOOL_CALLS]"),)
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "clock"


async def test_the_parser_can_be_chosen() -> None:
    targets = says('<|python_tag|>{"name": "clock", "parameters": {}}')
    answer = await post(ASKED, targets, tool_call_parser="llama3_json")
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_the_next_turn_with_calls_sent_back_is_recognized() -> None:
    store, first = MemoryStore(60), says("See. ", CALL)
    sent = (await post(ASKED, first, store=store))["choices"][0]["message"]
    sent["tool_calls"][0]["function"]["arguments"] = '{"city":"Oslo"}'  # clients parse and write them again
    result = {"role": "tool", "tool_call_id": sent["tool_calls"][0]["id"], "content": "rain"}
    second = says("Rain.")
    await post({**ASKED, "messages": [*CHAT["messages"], sent, result]}, second, store=store)
    assert second.requests[0].session_id == first.requests[0].session_id


async def test_a_turn_appended_to_a_session_goes_on_behind_the_call_and_keeps_the_functions() -> None:
    async with http(targets := says(CALL), context=4096) as client:
        await client.post("/v1/sessions", json={"session_id": "s"})
        answer = (await client.post("/v1/sessions/s/turns", json=ASKED)).json()
        history = (*targets.requests[0].token_ids, 10)
        call_id = answer["choices"][0]["message"]["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": call_id, "content": "rain"}
        again = (await client.post("/v1/sessions/s/turns", json={"messages": [result]})).json()
    prompt = targets.requests[1].token_ids
    assert prompt[: len(history)] == history
    assert tokenizer().decode(prompt[len(history) :]) == (
        "<|user|><tool_response>\nrain\n</tool_response><|assistant|>"
    )
    assert again["choices"][0]["finish_reason"] == "tool_calls"


async def grammar_of(body: dict[str, Any], **options: Any) -> Grammar | None:
    targets = says("ok")
    await post({**CHAT, **body}, targets, **options)
    return targets.requests[0].params.grammar


async def test_json_of_a_schema_is_a_grammar() -> None:
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert await grammar_of({"response_format": form}) == Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


async def test_any_json_object_is_a_grammar_and_text_is_none() -> None:
    found = [await grammar_of({"response_format": {"type": kind}}) for kind in ("json_object", "text")]
    assert found == [Grammar("json_schema", '{"type": "object"}'), None]


@pytest.mark.parametrize(
    ("wanted", "grammar"),
    [
        ({"json": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json": '{"type":"null"}'}, Grammar("json_schema", '{"type":"null"}')),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"choice": ["yes", 'n"o']}, Grammar("lark", 'start: "yes" | "n\\"o"')),
        ({"grammar": "start: /a/"}, Grammar("lark", "start: /a/")),
        ({"json_object": True}, Grammar("json_schema", '{"type": "object"}')),
    ],
)
async def test_structured_outputs_are_a_grammar(wanted: dict[str, Any], grammar: Grammar) -> None:
    assert await grammar_of({"structured_outputs": wanted}) == grammar


async def test_functions_alone_hold_the_model_to_nothing() -> None:
    assert await grammar_of({"tools": [WEATHER]}) is None


async def test_a_grammar_the_replicas_refuse_is_refused_with_its_field() -> None:
    def check(grammar: Grammar) -> None:
        raise InvalidRequest("response_format: no", param="response_format")

    async with http(says("ok"), check_grammar=check) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "response_format": {"type": "json_object"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
