"""Log probabilities and several choices, in OpenAI's shapes, whole and streamed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import AutoTokenizer

from paceline.api.logprobs import LOWEST, Offsets, TokenTexts, completion_logprobs
from paceline.models import ModelFiles
from paceline.seeds import choice_seed
from paceline.types import Delta, FinishReason, Metrics, TokenLogprobs
from tests.api.scripted import ACCEPTED, CHAT, COMPLETION, MODEL, ScriptedTargets, events, http, tokenizer
from tests.api.test_openai_client import MESSAGES, client_of

EOS = 2


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def entry(token: int, logprob: float = -0.5, *top: int) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, 2, tuple((other, -0.25) for other in top))


H, E_ACUTE, N = ids("h"), ids("é"), ids("n")
TOLD = ScriptedTargets(
    [
        ACCEPTED,
        Delta(
            (*H, E_ACUTE[0]), "h", logprobs=(entry(H[0], -0.5, N[0], H[0]), entry(E_ACUTE[0], -math.inf, N[0], H[0]))
        ),
        Delta((E_ACUTE[1], *N), "én", logprobs=(entry(E_ACUTE[1], -1, H[0], N[0]), entry(N[0], -1, N[0], H[0]))),
        Delta((EOS,), "", FinishReason.STOP, Metrics(4, 0, 5), logprobs=(entry(EOS, -2, N[0], H[0]),)),
    ]
)
ASKED = {"logprobs": True, "top_logprobs": 2}


async def post(path: str, body: dict[str, Any], targets: ScriptedTargets) -> Any:
    async with http(targets) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


def top(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.25, "bytes": list(text.encode())}


# Chat.


async def test_a_chat_choice_tells_each_token_with_its_bytes_and_the_likeliest() -> None:
    body = await post("/v1/chat/completions", {**CHAT, **ASKED}, TOLD)
    content = body["choices"][0]["logprobs"]["content"]
    assert content[0] == {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": [top("n"), top("h")]}
    assert [token["bytes"] for token in content] == [[104], [0xC3], [0xA9], [110], list(b"</s>")]


async def test_the_bytes_of_all_tokens_are_the_text() -> None:
    body = await post("/v1/chat/completions", {**CHAT, **ASKED}, TOLD)
    choice = body["choices"][0]
    told = bytes(byte for token in choice["logprobs"]["content"][:-1] for byte in token["bytes"])
    assert told.decode() == choice["message"]["content"] == "hén"


async def test_an_impossible_token_has_openais_lowest_number() -> None:
    body = await post("/v1/chat/completions", {**CHAT, **ASKED}, TOLD)
    assert body["choices"][0]["logprobs"]["content"][1]["logprob"] == LOWEST == -9999.0


async def test_a_streamed_chat_tells_each_chunk_of_its_own_tokens() -> None:
    whole = await post("/v1/chat/completions", {**CHAT, **ASKED}, TOLD)
    chunks = await post("/v1/chat/completions", {**CHAT, **ASKED, "stream": True}, TOLD)
    told = [chunk["choices"][0].get("logprobs") for chunk in chunks[:-1]]
    assert told[0] is None
    assert [len(each["content"]) for each in told[1:]] == [2, 2, 1]
    assert [token for each in told[1:] for token in each["content"]] == whole["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
async def test_logprobs_come_only_if_asked_for(path: str, body: dict[str, Any], stream: bool) -> None:
    assert "logprobs" not in str(await post(path, {**body, "stream": stream}, TOLD))


# Completions.


async def test_a_completion_tells_lists_of_tokens_offsets_and_likeliest() -> None:
    body = await post("/v1/completions", {**COMPLETION, "logprobs": 2}, TOLD)
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["h", "�", "�", "n", "</s>"],
        "token_logprobs": [-0.5, LOWEST, -1.0, -1.0, -2.0],
        "top_logprobs": [
            {"n": -0.25, "h": -0.25},
            {"n": -0.25, "h": -0.25, "�": LOWEST},
            {"h": -0.25, "n": -0.25, "�": -1.0},
            {"n": -0.25, "h": -0.25},
            {"n": -0.25, "h": -0.25, "</s>": -2.0},
        ],
        "text_offset": [0, 1, 1, 2, 3],
    }


async def test_a_streamed_completion_goes_on_counting_offsets() -> None:
    chunks = await post("/v1/completions", {**COMPLETION, "logprobs": 0, "stream": True}, TOLD)
    told = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]]
    assert told == [[0, 1], [1, 2], [3]]


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_are_vllms_list(stream: bool) -> None:
    delta = Delta((5,), "x", FinishReason.STOP, prompt_logprobs=(entry(N[0], -3.0, H[0], N[0]),))
    body = {**COMPLETION, "prompt_logprobs": 2, "stream": stream}
    answer = await post("/v1/completions", body, ScriptedTargets([ACCEPTED, delta]))
    choice = (answer[0] if stream else answer)["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(H[0]): {"logprob": -0.25, "rank": 1, "decoded_token": "h"},
            str(N[0]): {"logprob": -3.0, "rank": 2, "decoded_token": "n"},
        },
    ]


# Several choices.

TWO = [
    ACCEPTED,
    Delta((10,), "a"),
    Delta((20, 21), "A", index=1),
    Delta((11,), "b", FinishReason.STOP, Metrics(4, 1, 2, drafted=3, accepted=2, steps=2, ttft_s=0.2, total_s=1)),
    Delta(
        (22,),
        "B",
        FinishReason.LENGTH,
        Metrics(4, 3, 3, drafted=1, accepted=1, steps=3, ttft_s=0.1, total_s=2),
        index=1,
    ),
]


async def test_choices_have_their_own_text_and_end() -> None:
    body = await post("/v1/chat/completions", {**CHAT, "n": 2}, ScriptedTargets(TWO))
    found = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]]
    assert found == [(0, "ab", "stop"), (1, "AB", "length")]


async def test_usage_counts_the_prompt_once_and_sums_the_outputs() -> None:
    body = await post("/v1/completions", {**COMPLETION, "n": 2}, ScriptedTargets(TWO))
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1},
    }
    info = body["paceline"]
    assert (info["drafted_tokens"], info["accepted_tokens"], info["ttft_s"], info["total_s"]) == (4, 3, 0.1, 2)
    assert info["seeds"] == [7, choice_seed(7, 1)]


async def test_token_ids_of_choices_are_kept_apart() -> None:
    body = {**COMPLETION, "n": 2, "return_token_ids": True}
    info = (await post("/v1/completions", body, ScriptedTargets(TWO)))["paceline"]
    assert info["choice_token_ids"] == [[10, 11], [20, 21, 22]]


async def test_a_stream_of_choices_opens_each_and_ends_when_all_have() -> None:
    chunks = await post("/v1/chat/completions", {**CHAT, "n": 2, "stream": True}, ScriptedTargets(TWO))
    told = [(c["choices"][0]["index"], c["choices"][0]["delta"]["content"]) for c in chunks[:-1]]
    assert told == [(0, ""), (1, ""), (0, "a"), (1, "A"), (0, "b"), (1, "B")]
    assert [c["choices"][0].get("finish_reason") for c in chunks[-3:-1]] == ["stop", "length"]
    assert ["paceline" in c for c in chunks[-3:-1]] == [False, True]


async def test_openais_client_reads_choices_and_logprobs() -> None:
    async with client_of(ScriptedTargets(TWO)) as client:
        completion = await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, logit_bias={"5": -100})
    assert [choice.message.content for choice in completion.choices] == ["ab", "AB"]
    async with client_of(TOLD) as client:
        told = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
        older = await client.completions.create(model=MODEL, prompt="hi", logprobs=2)
    assert told.choices[0].logprobs is not None
    assert told.choices[0].logprobs.content is not None
    assert [t.token for t in told.choices[0].logprobs.content[0].top_logprobs] == ["n", "h"]
    assert older.choices[0].logprobs is not None
    assert older.choices[0].logprobs.text_offset == [0, 1, 1, 2, 3]


# The bytes of tokens.


def test_bytes_of_real_tokens_join_to_the_text(smollm2: ModelFiles) -> None:
    real = AutoTokenizer.from_pretrained(smollm2.path)
    text = "Zwölf 🙂 naïve\n\tfür 你好"
    texts = TokenTexts(real)
    assert b"".join(texts.bytes_of(token) for token in real.encode(text)).decode() == text


def test_a_sentencepiece_vocabulary_spells_spaces_and_bytes() -> None:
    class Pieces:
        all_special_ids = (0,)

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 0, "▁the": 1, "<0xE2>": 2}

        def get_added_vocab(self) -> dict[str, int]:
            return {"<s>": 0}

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {token: text for text, token in self.get_vocab().items()}.get(token)

    texts = TokenTexts(Pieces())  # type: ignore[arg-type]
    assert [texts.bytes_of(token) for token in (0, 1, 2, 3)] == [b"<s>", b" the", b"\xe2", b""]
    assert completion_logprobs([entry(0), entry(1), entry(1)], texts, Offsets()).text_offset == [0, 0, 4]
