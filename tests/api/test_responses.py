"""/v1/responses: items in and out, events, and conversations that are gone on from by an id."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from paceline.errors import Unavailable
from paceline.sessions.store import MemoryStore
from paceline.types import Delta, Failure, FinishReason, Grammar
from tests.api.scripted import ACCEPTED, HELLO, MODEL, Hang, ScriptedTargets, http, tokenizer
from tests.api.test_tool_calls import CALL, says

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


async def post(body: dict[str, Any], targets: ScriptedTargets | None = None, **options: Any) -> Any:
    async with http(targets, context=4096, **options) as client:
        response = await client.post(PATH, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    return told(response.text) if body.get("stream") else response.json()


def told(body: str) -> list[dict[str, Any]]:
    """The events of a stream, each under the name it says itself."""
    found = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def prompt(targets: ScriptedTargets) -> str:
    text: str = tokenizer().decode(targets.requests[-1].token_ids)
    return text


async def test_a_response_has_its_text_as_an_item_and_says_what_it_cost() -> None:
    answer = await post({"instructions": "Be kind.", "metadata": {"a": "b"}, "temperature": 0.5})
    message = answer["output"][0]
    assert answer["id"].startswith("resp_")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert answer["usage"] == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
    }
    echoed = {key: answer[key] for key in ("object", "status", "model", "metadata", "temperature", "instructions")}
    assert echoed == {
        "object": "response",
        "status": "completed",
        "model": MODEL,
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "instructions": "Be kind.",
    }
    assert answer["paceline"]["replica_id"] == "target-1"


async def test_instructions_are_a_system_message_in_front_of_the_input() -> None:
    targets = ScriptedTargets()
    await post({"instructions": "Be kind."}, targets)
    assert prompt(targets) == "<|system|>Be kind.<|user|>hi<|assistant|>"


async def test_the_events_of_a_text_tell_of_its_item_its_part_and_its_growth() -> None:
    events = await post({"stream": True})
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(10))
    assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])


async def test_the_events_of_a_call_tell_of_its_arguments() -> None:
    events = await post({"stream": True, "tools": [WEATHER]}, says("So: ", CALL[:40], CALL[40:]))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[4:-1] == [
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    call = events[-2]["item"]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Oslo"}')
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call"]


async def test_streamed_and_whole_responses_have_the_same_output() -> None:
    streamed = (await post({"stream": True, "tools": [WEATHER]}, says("So: ", CALL)))[-1]["response"]["output"]
    whole = (await post({"tools": [WEATHER]}, says("So: ", CALL)))["output"]
    for item in (*streamed, *whole):
        item.pop("id")
        item.pop("call_id", None)
    assert streamed == whole


async def test_a_response_cut_off_by_its_limit_is_incomplete() -> None:
    script = [ACCEPTED, Delta((1,), "Hel", FinishReason.LENGTH)]
    answer = await post({"max_output_tokens": 1}, ScriptedTargets(script))
    events = await post({"stream": True}, ScriptedTargets(script))
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events[-1]["type"] == "response.incomplete"
    assert answer["output"][0]["status"] == "incomplete"


async def test_an_error_on_the_way_is_a_failed_response() -> None:
    events = await post({"stream": True}, ScriptedTargets([*HELLO[:2], Failure("service_unavailable", "gone")]))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "service_unavailable", "message": "gone"}


async def test_an_error_before_the_first_event_has_its_status() -> None:
    async with http(ScriptedTargets([Unavailable("gone")])) as client:
        response = await client.post(PATH, json={"input": "hi", "stream": True})
    assert response.status_code == 503


async def test_an_output_without_text_is_an_empty_message() -> None:
    answer = await post({}, ScriptedTargets([ACCEPTED, Delta((1,), "", FinishReason.STOP)]))
    assert answer["output"][0]["content"][0]["text"] == ""


async def test_items_are_the_messages_of_a_chat() -> None:
    targets = ScriptedTargets()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "See."}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    await post({"input": items}, targets)
    assert prompt(targets) == (
        '<|user|>Weather?<|assistant|>See.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
        "<|user|><tool_response>\nrain\n</tool_response><|assistant|>"
    )


async def test_the_output_of_a_response_can_be_sent_back_as_input() -> None:
    output = (await post({"tools": [WEATHER]}, says("So: ", CALL)))["output"]
    result = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "rain"}
    answer = await post({"input": [{"role": "user", "content": "hi"}, *output, result], "tools": [WEATHER]})
    assert answer["status"] == "completed"


async def test_json_of_a_schema_is_a_grammar() -> None:
    targets = ScriptedTargets()
    await post({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "null"}}}}, targets)
    assert targets.requests[0].params.grammar == Grammar("json_schema", '{"type": "null"}')


async def go_on(store: MemoryStore, previous: str | None, text: str, targets: ScriptedTargets, **body: Any) -> Any:
    return await post({"previous_response_id": previous, "input": text, **body}, targets, store=store)


async def test_a_previous_response_is_gone_on_from_with_its_tokens() -> None:
    store, targets = MemoryStore(60), ScriptedTargets()
    first = await go_on(store, None, "hi", targets)
    second = await go_on(store, first["id"], "more", targets)
    asked, again = targets.requests
    assert second["previous_response_id"] == first["id"]
    assert again.session_id == asked.session_id
    assert again.token_ids[: len(asked.token_ids) + 3] == (*asked.token_ids, 10, 11, 12)
    assert tokenizer().decode(again.token_ids[len(asked.token_ids) + 3 :]) == "<|user|>more<|assistant|>"


async def test_instructions_are_those_of_the_response_alone() -> None:
    store, targets = MemoryStore(60), ScriptedTargets()
    first = await go_on(store, None, "hi", targets, instructions="Be kind.")
    await go_on(store, first["id"], "more", targets, instructions="Be brief.")
    assert prompt(targets) == "<|system|>Be brief.<|user|>hi<|assistant|>Hello<|user|>more<|assistant|>"


async def test_a_response_in_the_middle_is_gone_on_from_in_a_session_of_its_own() -> None:
    store, targets = MemoryStore(60), ScriptedTargets()
    first = await go_on(store, None, "hi", targets)
    second = await go_on(store, first["id"], "more", targets)
    await go_on(store, first["id"], "other", targets)
    assert prompt(targets) == "<|user|>hi<|assistant|>Hello<|user|>other<|assistant|>"
    assert targets.requests[2].session_id != targets.requests[1].session_id
    await go_on(store, second["id"], "yet more", targets)
    assert targets.requests[3].session_id == targets.requests[1].session_id


async def test_two_that_go_on_at_once_are_two_sessions() -> None:
    store, targets = MemoryStore(60), ScriptedTargets()
    first = await go_on(store, None, "hi", targets)
    hanging = ScriptedTargets([ACCEPTED, Hang()])
    async with http(targets, store=store) as client:
        gateway = client._transport.app.state.gateway  # type: ignore[attr-defined]
        gateway._targets = hanging
        body = {"input": "one", "previous_response_id": first["id"]}
        one = asyncio.create_task(client.post(PATH, json=body))
        await hanging.hanging.wait()
        gateway._targets = targets
        two = (await client.post(PATH, json={**body, "input": "two"})).json()
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
    assert two["status"] == "completed"
    assert hanging.requests[0].session_id != targets.requests[1].session_id


async def test_any_router_of_a_store_knows_a_response() -> None:
    store = MemoryStore(60)
    sent = await post({"metadata": {"a": "b"}}, store=store)
    async with http(store=store) as client:
        found = (await client.get(f"{PATH}/{sent['id']}")).json()
    assert {**found, "paceline": None} == {**sent, "paceline": None}


async def test_a_deleted_response_is_gone_and_its_session_with_the_last() -> None:
    store = MemoryStore(60)
    first = await post({}, store=store)
    second = await post({"previous_response_id": first["id"]}, store=store)
    async with http(store=store) as client:
        deleted = (await client.delete(f"{PATH}/{first['id']}")).json()
        left = [(await client.get(f"{PATH}/{each['id']}")).status_code for each in (first, second)]
        sessions = len(await store.summaries())
        await client.delete(f"{PATH}/{second['id']}")
    assert deleted == {"object": "response", "id": first["id"], "deleted": True}
    assert (left, sessions, len(await store.summaries())) == ([404, 200], 1, 0)


async def test_a_session_keeps_its_last_responses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.api.conversations.KEPT_RESPONSES", 2)
    store, sent = MemoryStore(60), [None]
    for _ in range(3):
        sent.append((await go_on(store, sent[-1], "hi", ScriptedTargets()))["id"])
    async with http(store=store) as client:
        found = [(await client.get(f"{PATH}/{name}")).status_code for name in sent[1:]]
    assert found == [404, 200, 200]


async def test_a_response_that_is_not_to_be_stored_is_not() -> None:
    store, targets = MemoryStore(60), ScriptedTargets()
    sent = await post({"store": False}, targets, store=store)
    async with http(store=store) as client:
        found = await client.get(f"{PATH}/{sent['id']}")
    assert (found.status_code, await store.summaries()) == (404, [])
    assert targets.requests[0].session_id is None


@pytest.mark.parametrize("response_id", ["resp_1", f"resp_{'0' * 40}", "x" * 500])
async def test_an_unknown_response_is_refused_with_the_field(response_id: str) -> None:
    async with http() as client:
        posted = await client.post(PATH, json={"input": "hi", "previous_response_id": response_id})
        got = await client.get(f"{PATH}/{response_id}")
    error = posted.json()["error"]
    assert (posted.status_code, error["param"]) == (404, "previous_response_id")
    assert got.status_code == 404


async def test_a_stored_response_is_not_streamed() -> None:
    async with http() as client:
        response = await client.get(f"{PATH}/resp_1", params={"stream": "true"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")


async def test_instructions_and_a_system_message_are_one() -> None:
    targets = ScriptedTargets()
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    await post({"instructions": "Be kind.", "input": said}, targets)
    assert prompt(targets).count("<|system|>") == 1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
    ({"input": ["hi"]}, "input.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
    ({"input": [{"role": "robot", "content": "hi"}]}, "input.0.role"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
    ({"input": "x" * 600}, "input"),
    ({"instructions": 3}, "instructions"),
    ({"previous_response_id": 3}, "previous_response_id"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 600}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"moderation": {}}, "moderation"),
    ({"seed": 1.5}, "seed"),
    ({"priority": 1}, "priority"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG)
async def test_bad_input_is_refused_with_the_name_of_its_field(wrong: dict[str, Any], field: str) -> None:
    async with http() as client:
        response = await client.post(PATH, json={"input": "hi", **wrong})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert field in error["message"]
