"""A request whose replica was lost comes out of another engine as if nothing had happened, wherever it was cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from paceline.engine.engine import Engine
from paceline.errors import InvalidRequest
from paceline.speculation.local import LocalProposer
from paceline.types import Delta, FinishReason, Metrics, Request, TokenLogprobs
from tests import tiny

MODEL = tiny.tiny_llama()
PROMPT = tiny.prompt(30, seed=1)
LENGTH = 14
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SEEDED,
    "repetition_penalty": {**SEEDED, "repetition_penalty": 1.8},
    "frequency_and_presence": {"frequency_penalty": 1.5, "presence_penalty": 0.7},
    "biased": {**SEEDED, "logit_bias": {5: 9.0}, "frequency_penalty": 2.0},
    "min_tokens": {**SEEDED, "min_tokens": 9, "stop_token_ids": tuple(range(3, tiny.VOCAB, 2))},
    "logprobs": {**SEEDED, "logprobs": 3},
    "prompt_logprobs": {**SEEDED, "prompt_logprobs": 2},
    "stop_string": {**SEEDED, "min_tokens": 2},
    "kept_stop_string": {**SEEDED, "include_stop_str_in_output": True},
}


class Letters:
    """Each id is two letters, so that stop strings lie across token borders."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token // 26) + chr(97 + token % 26) for token in token_ids)


@dataclass
class Answer:
    """All that one request's client sees."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def add(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish_reason = delta.finish_reason
        self.metrics = delta.metrics or self.metrics

    @property
    def seen(self) -> tuple[Any, ...]:
        """What must not differ."""
        told = [(each.token_id, round(each.logprob, 4), each.rank) for each in (*self.logprobs, *self.prompt_logprobs)]
        counted = self.metrics.prompt_tokens, self.metrics.completion_tokens
        return self.token_ids, self.text, told, self.finish_reason, counted


def engine(drafting: bool = False, **settings: Any) -> Engine:
    proposer = LocalProposer(tiny.drafter_for(MODEL)) if drafting else None
    return tiny.engine_for(MODEL, proposer=proposer, decoder=Letters(), **settings)


def request(way: str, **params: Any) -> Request:
    """Under the ways with a stop string, one that occurs in the middle of the answer, across two tokens."""
    chosen = {"max_tokens": LENGTH, **WAYS[way], **params}
    if "stop_string" in way and "stop" not in params:
        text = whole(tiny.request(PROMPT, **chosen), engine()).text
        chosen["stop"] = (text[LENGTH + 1 : LENGTH + 4],)
    return tiny.request(PROMPT, **chosen)


def whole(asked: Request, by: Engine) -> Answer:
    by.add(asked)
    answer = Answer()
    for _, delta in tiny.deltas(by):
        answer.add(delta)
    by.check()
    return answer


def interrupted(asked: Request, cut: int, *, first: Engine, then: Engine) -> Answer:
    """The answer of two engines, the first of which is lost once it has told `cut` tokens or more."""
    first.add(asked)
    answer = Answer()
    while len(answer.token_ids) < cut:
        for delta in first.step().values():
            answer.add(delta)
    if answer.finish_reason is None:
        rest = whole(replace(asked, resumed=(tuple(answer.token_ids),)), then)
        answer.add(Delta(tuple(rest.token_ids), rest.text, rest.finish_reason, rest.metrics))
        answer.logprobs += rest.logprobs
        answer.prompt_logprobs += rest.prompt_logprobs
    return answer


@pytest.mark.parametrize("way", WAYS)
def test_cut_anywhere_the_client_sees_the_same(way: str) -> None:
    asked = request(way)
    undisturbed = whole(asked, engine())
    for cut in range(len(undisturbed.token_ids)):
        assert interrupted(asked, cut, first=engine(), then=engine()).seen == undisturbed.seen


@pytest.mark.parametrize("way", ["greedy", "seeded", "repetition_penalty", "stop_string"])
def test_with_drafts_on_both_sides_the_client_sees_the_same(way: str) -> None:
    asked = request(way)
    undisturbed = whole(asked, engine())
    for cut in range(0, len(undisturbed.token_ids), 3):
        found = interrupted(asked, cut, first=engine(drafting=True), then=engine(drafting=True, lookup=4))
        assert found.seen == undisturbed.seen


def test_drafts_go_on_after_a_resumption() -> None:
    found = interrupted(request("repetition_penalty"), 5, first=engine(), then=engine(drafting=True))
    assert found.metrics.drafted == found.metrics.accepted > 0


def test_a_stop_string_that_lies_across_the_cut_ends_the_answer() -> None:
    plain = whole(request("seeded"), engine())
    across = plain.text[9:11]  # the end of token 4 and the beginning of token 5
    asked = request("seeded", stop=(across,))
    found = interrupted(asked, 5, first=engine(), then=engine())
    assert found.text == plain.text[: plain.text.index(across)]
    assert found.finish_reason is FinishReason.STOP


def test_under_rejection_sampling_without_drafts_the_tokens_are_the_same() -> None:
    asked = request("seeded")
    undisturbed = whole(asked, engine(verification="rejection"))
    for cut in range(LENGTH):
        pair = {"first": engine(verification="rejection"), "then": engine(verification="rejection")}
        assert interrupted(asked, cut, **pair).seen == undisturbed.seen


def test_without_kv_a_resumption_costs_a_prefill() -> None:
    found = interrupted(request("greedy"), 6, first=engine(), then=engine())
    assert found.metrics.cached_tokens == 0
    assert found.metrics.steps == LENGTH - 6 - 1  # its first token comes with the prefill


def test_only_what_is_of_the_prompt_counts_as_cached() -> None:
    by = engine()
    output = tuple(whole(request("greedy"), by).token_ids[:6])  # leaves prompt and answer behind as cache
    found = whole(replace(request("greedy"), resumed=(output,)), by)
    assert found.metrics.cached_tokens == len(PROMPT)


def test_of_several_outputs_only_those_that_had_not_ended_go_on() -> None:
    asked = tiny.request(PROMPT, **{**SEEDED, "max_tokens": LENGTH, "n": 3})
    undisturbed = {n: whole(choice, engine()).token_ids for n, choice in enumerate(asked.choices())}
    resumed = replace(asked, resumed=(tuple(undisturbed[0][:4]), None, ()))
    by = engine()
    by.add_all(resumed.choices())
    rest: dict[int, list[int]] = {}
    for _, delta in tiny.deltas(by):
        rest.setdefault(delta.index, []).extend(delta.token_ids)
    assert rest == {0: undisturbed[0][4:], 2: undisturbed[2]}


@pytest.mark.parametrize("output", [(5,) * LENGTH, (5,) * (LENGTH + 1)])
def test_an_output_without_room_for_more_is_refused(output: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="resumed") as caught:
        engine().add(replace(request("greedy"), resumed=(output,)))
    assert caught.value.param == "resumed"


def test_resumed_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="resumed"):
        engine().add(replace(request("greedy"), resumed=((tiny.VOCAB,),)))
