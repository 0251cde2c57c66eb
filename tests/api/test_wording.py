"""What an event says, whichever way it is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.api.logprobs import TokenTexts
from paceline.api.wording import TEXT_MARK, ChatWording
from paceline.types import Delta, FinishReason, Request, SamplingParams
from tests.api.scripted import ACCEPTED, tokenizer

TEXTS = TokenTexts(tokenizer())


def wording(**chosen: bool) -> ChatWording:
    return ChatWording("chatcmpl-1", "a model", 7, TEXTS, **chosen)


def request(**params: int) -> Request:
    return Request("chatcmpl-1", (1,), SamplingParams(n=2, seed=1, **params))


@given(st.text() | st.just(TEXT_MARK), st.sampled_from([0, 1]))
def test_the_short_way_writes_the_same_event(text: str, index: int) -> None:
    made, delta = wording(), Delta((10,), text, index=index)
    tally = made.tally([request()], ACCEPTED)
    tally.add(delta)
    (chunk,) = made.chunks(tally, delta)
    assert made.text_event(tally, delta) == made.event(tally, chunk)
    assert json.loads((made.text_event(tally, delta) or b"")[6:])["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize(
    ("chosen", "params", "delta"),
    [
        ({}, {}, Delta((10,), "x", FinishReason.STOP)),
        ({"return_token_ids": True}, {}, Delta((10,), "x")),
        ({}, {"logprobs": 1}, Delta((10,), "x")),
    ],
    ids=["the end", "token ids", "log probabilities"],
)
def test_what_has_more_to_say_takes_the_long_way(chosen: dict[str, bool], params: dict[str, int], delta: Delta) -> None:
    made = wording(**chosen)
    assert made.text_event(made.tally([request(**params)], ACCEPTED), delta) is None
