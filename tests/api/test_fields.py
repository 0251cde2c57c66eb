"""Every field of OpenAI's does what the table of supported fields says, and the table says no more than that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams

from paceline.api.schema import ChatCompletionRequest, CompletionRequest
from paceline.api.schema_responses import ResponsesRequest
from paceline.types import Request
from tests.api.field_cases import (
    BODIES,
    CASES,
    CHATS,
    COMPLETIONS,
    DOCUMENT,
    PREVIOUS,
    RESPONSES,
    Case,
    Idle,
    Refused,
    Seen,
    table,
)
from tests.api.scripted import HELLO, ScriptedTargets, events, http, tokenizer
from tests.api.test_responses import told

LATER = {"stream"}
"""Fields of OpenAI's that its parameter types add by streaming variant."""


async def outcome(endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
    """What can be seen of a request, by the first word of a path."""
    script = [replace(delta, index=n) for n in range(body.get("n", 1)) for delta in HELLO[1:]]
    targets = ScriptedTargets([HELLO[0], *script])
    async with http(targets, context=4096, scheduling_policy="priority") as client:
        if body.get("previous_response_id") == PREVIOUS:
            before = await client.post(endpoint, json=BODIES[endpoint])
            body = {**body, "previous_response_id": before.json()["id"]}
        response = await client.post(endpoint, json=body)
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    reader = told if endpoint == RESPONSES else events
    return {
        "request": targets.requests[-1],
        "prompt": tokenizer().decode(targets.requests[-1].token_ids),
        "answer": None if streamed else response.json(),
        "events": reader(response.text) if streamed else None,
        "headers": dict(response.headers),
    }


def at(found: Any, path: str) -> Any:
    """What lies at a dotted path of objects, mappings and lists; None if nothing does."""
    for step in path.split("."):
        if isinstance(found, dict):
            found = found.get(step)
        elif isinstance(found, list):
            found = found[int(step)]
        else:
            found = getattr(found, step, None)
    return found


def fulfils(found: Any, expected: Any) -> bool:
    return bool(expected(found)) if callable(expected) else bool(found == expected)


def of(kind: type[Case]) -> Any:
    cases = [case for case in CASES if isinstance(case, kind)]
    return pytest.mark.parametrize("case", cases, ids=[f"{case.endpoint}-{case.field}" for case in cases])


def body_of(case: Case) -> dict[str, Any]:
    return {**BODIES[case.endpoint], **case.more}


@of(Seen)
async def test_a_supported_field_has_its_effect(case: Seen) -> None:
    with_it = await outcome(case.endpoint, {**body_of(case), case.field: case.value})
    assert fulfils(at(with_it, case.where), case.expected), at(with_it, case.where)
    if case.differs:
        without = await outcome(case.endpoint, body_of(case))
        assert not fulfils(at(without, case.where), case.expected)


def same(request: Request) -> tuple[Any, ...]:
    """A request but for what is drawn for each."""
    params = {name: getattr(request.params, name) for name in request.params.__slots__ if name != "seed"}
    return request.token_ids, params, request.speculate, request.priority


@of(Idle)
async def test_an_accepted_field_has_no_effect(case: Idle) -> None:
    with_it = await outcome(case.endpoint, {**body_of(case), case.field: case.value})
    without = await outcome(case.endpoint, body_of(case))
    assert same(with_it["request"]) == same(without["request"])


@of(Refused)
async def test_a_refused_field_is_named(case: Refused) -> None:
    async with http() as client:
        response = await client.post(case.endpoint, json={**body_of(case), case.field: case.value})
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert error["param"].split(".")[0] == case.field


@pytest.mark.parametrize(
    ("endpoint", "params", "model"),
    [
        (CHATS, ChatParams, ChatCompletionRequest),
        (COMPLETIONS, CompletionParams, CompletionRequest),
        (RESPONSES, ResponseParams, ResponsesRequest),
    ],
)
def test_every_field_of_openais_and_of_ours_has_a_case(endpoint: str, params: Any, model: Any) -> None:
    shown = {case.field for case in CASES if case.endpoint == endpoint}
    assert (set(params.__annotations__) | set(model.model_fields) | LATER) - shown == set()


def test_no_case_is_of_a_field_that_is_not_there() -> None:
    models: dict[str, Any] = {CHATS: ChatCompletionRequest, COMPLETIONS: CompletionRequest, RESPONSES: ResponsesRequest}
    assert [case for case in CASES if case.field not in models[case.endpoint].model_fields] == []


def test_the_table_is_that_of_the_cases() -> None:
    assert DOCUMENT.read_text() == table(), "run python -m tests.api.field_cases"
