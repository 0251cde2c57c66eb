"""Text completions: lists of prompts, echo, nothing to generate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import chain
from typing import Any

import pytest

from paceline.api.batch import MAX_AT_ONCE
from paceline.errors import Overloaded
from paceline.types import Accepted, Delta, Failure, FinishReason, Frame, Metrics, Request, TokenLogprobs
from tests.api.scripted import ACCEPTED, COMPLETION, Hang, ScriptedTargets, events, http, tokenizer

PATH = "/v1/completions"


class EchoingTargets(ScriptedTargets):
    """Says the prompt's tokens again, one a delta, with log probabilities if they are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.running = self.most = 0

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        params, tokens = request.params, request.token_ids[: request.params.max_tokens]
        yield Accepted("target-1", params.seed or 0, len(request.token_ids))
        await asyncio.sleep(0)
        told = () if params.prompt_logprobs is None else tuple(map(logprob, request.token_ids[1:]))
        for n in range(params.n):
            for place, token in enumerate(tokens):
                last = place == len(tokens) - 1
                metrics = Metrics(prompt_tokens=len(request.token_ids), completion_tokens=len(tokens))
                yield Delta(
                    (token,),
                    tokenizer().decode([token]),
                    FinishReason.LENGTH if last else None,
                    metrics if last else None,
                    n,
                    (logprob(token),) if params.logprobs is not None else (),
                    told if n == 0 and place == 0 else (),
                )
        self.running -= 1


def logprob(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -token / 8, 2, ((token - 1, -0.5), (token, -token / 8)))


async def post(body: dict[str, Any], targets: ScriptedTargets | None = None) -> Any:
    async with http(targets or EchoingTargets()) as client:
        response = await client.post(PATH, json={**COMPLETION, **body})
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


def texts(answer: Any) -> list[tuple[int, str]]:
    return [(choice["index"], choice["text"]) for choice in answer["choices"]]


@pytest.mark.parametrize("prompts", [["ab", "cd"], [tokenizer().encode("ab"), tokenizer().encode("cd")]])
async def test_every_prompt_of_a_list_has_its_choices_one_after_the_other(prompts: list[Any]) -> None:
    answer = await post({"prompt": prompts, "n": 2})
    assert texts(answer) == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]


async def test_the_usage_of_a_list_counts_each_prompt_once() -> None:
    usage = (await post({"prompt": ["ab", "cde"], "n": 2}))["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 10)


async def test_a_list_streams_with_the_index_of_each_choice() -> None:
    *chunks, done = await post({"prompt": ["ab", "cd"], "stream": True})
    found = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == n) for n in range(2)]
    assert (found, done) == (["ab", "cd"], "[DONE]")


async def test_every_prompt_of_a_list_has_the_same_seed() -> None:
    targets = EchoingTargets()
    await post({"prompt": ["ab", "cd"]}, targets)
    assert len({request.params.seed for request in targets.requests}) == 1


async def test_of_a_long_list_only_so_many_run_together() -> None:
    targets = EchoingTargets()
    answer = await post({"prompt": [f"p{n}" for n in range(50)]}, targets)
    assert len(answer["choices"]) == 50
    assert 1 < targets.most <= MAX_AT_ONCE


async def test_a_list_of_which_the_first_is_refused_has_its_status() -> None:
    async with http(ScriptedTargets([Failure.of(Overloaded("full", retry_after=2))])) as client:
        response = await client.post(PATH, json={**COMPLETION, "prompt": ["a", "b"]})
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")


async def test_a_list_of_which_one_fails_ends_all() -> None:
    targets = ScriptedTargets([ACCEPTED, Delta((1,), "a"), Failure("service_unavailable", "gone")])
    async with http(targets) as client:
        response = await client.post(PATH, json={**COMPLETION, "prompt": ["a", "b"]})
    assert response.status_code == 503
    assert len(targets.ended) == len(targets.requests)


async def test_a_list_past_its_deadline_ends_with_a_timeout() -> None:
    async with http(ScriptedTargets([ACCEPTED, Hang()]), timeout_s=0.05) as client:
        response = await client.post(PATH, json={**COMPLETION, "prompt": ["a", "b"]})
    assert response.status_code == 504


@pytest.mark.parametrize("prompt", ["ab", tokenizer().encode("ab")])
async def test_echo_begins_with_the_prompt(prompt: Any) -> None:
    assert texts(await post({"prompt": prompt, "echo": True})) == [(0, "abab")]


async def test_a_streamed_echo_begins_with_the_prompt_once() -> None:
    chunks = (await post({"prompt": "ab", "echo": True, "stream": True}))[:-1]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["aba", "b"]


async def test_echoed_logprobs_begin_with_the_prompts_of_which_the_first_is_unknown() -> None:
    a, b = tokenizer().encode("ab")
    told = (await post({"prompt": "ab", "echo": True, "logprobs": 1}))["choices"][0]["logprobs"]
    before = tokenizer().decode([b - 1])
    assert told["tokens"] == ["a", "b", "a", "b"]
    assert told["token_logprobs"] == [None, -b / 8, -a / 8, -b / 8]
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][1] == {before: -0.5, "b": -b / 8}
    assert told["text_offset"] == [0, 1, 2, 3]


async def test_streamed_echoed_logprobs_add_up_to_the_whole() -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1}
    chunks = (await post({**body, "stream": True}))[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    whole = (await post(body))["choices"][0]["logprobs"]
    assert {key: list(chain.from_iterable(part[key] for part in parts)) for key in whole} == whole


async def test_nothing_to_generate_with_echo_is_the_prompt_alone() -> None:
    answer = await post({"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_nothing_to_generate_streams_the_prompt_alone() -> None:
    chunks = (await post({"prompt": "ab", "echo": True, "max_tokens": 0, "stream": True}))[:-1]
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [("ab", "length")]


async def test_nothing_to_generate_without_echo_is_refused() -> None:
    async with http() as client:
        response = await client.post(PATH, json={**COMPLETION, "max_tokens": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")


async def test_prompt_logprobs_are_told_beside_an_echo_as_many_as_were_asked_for() -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 2, "prompt_logprobs": 0}
    told = (await post(body))["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    assert len(told[1]) == 1
