"""Presence in proto3 decides between a value and its default."""

from __future__ import annotations

import pytest

from paceline.api.state import SessionInfo
from paceline.errors import InvalidRequest
from paceline.rpc.inference_convert import input_from, params_from, prompt_from, speculation_from
from paceline.rpc.inference_events import delta_events, session_message, started_event
from paceline.types import Accepted, Delta, FinishReason, Metrics, Request, SamplingParams, TokenLogprobs, Verified
from paceline.v1 import inference_pb2 as pb


def test_unset_parameters_have_their_defaults_and_no_limit() -> None:
    assert params_from(pb.SamplingParams()) == SamplingParams(max_tokens=None)


def test_zero_is_a_value() -> None:
    params = params_from(pb.SamplingParams(temperature=0, seed=0, top_k=0, min_p=0))
    assert (params.greedy, params.seed) == (True, 0)


def test_every_parameter_is_carried() -> None:
    message = pb.SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={9: -1.5, 4: 2},
        min_tokens=3,
        include_stop_str_in_output=True,
        logprobs=2,
        prompt_logprobs=1,
        n=4,
        ctx_size=64,
        n_keep=0,
        n_discard=-1,
    )
    assert params_from(message) == SamplingParams(
        5,
        0.5,
        0.25,
        3,
        0.125,
        2**64 - 1,
        ("a", "b"),
        (9,),
        True,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={4: 2.0, 9: -1.5},
        min_tokens=3,
        include_stop_str_in_output=True,
        logprobs=2,
        prompt_logprobs=1,
        n=4,
        ctx_size=64,
        n_keep=0,
        n_discard=-1,
    )


def test_logprobs_zero_is_a_value() -> None:
    params = params_from(pb.SamplingParams(logprobs=0, prompt_logprobs=0))
    assert (params.logprobs, params.prompt_logprobs) == (0, 0)


def test_tokens_carry_their_log_probabilities_and_their_output() -> None:
    entry = TokenLogprobs(5, -0.5, 2, ((7, -0.25), (5, -0.5)))
    (event,) = delta_events(Delta((5,), "x", index=3, logprobs=(entry,), prompt_logprobs=(entry, entry)), Metrics())
    told = pb.TokenLogprobs(
        token_id=5,
        logprob=-0.5,
        rank=2,
        top=[pb.TopLogprob(token_id=7, logprob=-0.25), pb.TopLogprob(token_id=5, logprob=-0.5)],
    )
    assert event.tokens == pb.Tokens(token_ids=[5], text="x", index=3, logprobs=[told], prompt_logprobs=[told, told])


def test_accepted_candidates_are_told() -> None:
    (event,) = delta_events(Delta((5, 6), "xy", verified=Verified("local", drafted=4, accepted=1, chars=1)), Metrics())
    assert event.tokens.verified == pb.Verified(source="local", drafted=4, accepted=1, chars=1)


def test_a_step_without_candidates_tells_none() -> None:
    (event,) = delta_events(Delta((5,), "x"), Metrics())
    assert not event.tokens.HasField("verified")


def test_a_wrong_parameter_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        params_from(pb.SamplingParams(max_tokens=0))
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, True), ({"speculation": True}, True), ({"speculation": False}, False)]
)
def test_speculation_is_on_unless_turned_off(given: dict[str, bool], expected: bool) -> None:
    assert speculation_from(pb.ChatRequest(**given)) is expected


def test_a_prompt_is_text_or_token_ids() -> None:
    assert prompt_from(pb.GenerateRequest(text="hi")) == "hi"
    assert prompt_from(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))) == (1, 2)


def test_a_missing_prompt_or_input_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: "):
        prompt_from(pb.GenerateRequest())
    with pytest.raises(InvalidRequest, match=r"^input: "):
        input_from(pb.TokenizeRequest())


def test_a_session_says_where_its_kv_is() -> None:
    assert session_message(SessionInfo("s", "r", 40, False, 100, "disk")).kv_tier == "disk"


def test_an_end_without_tokens_is_one_event() -> None:
    (event,) = delta_events(Delta((), "", FinishReason.ABORT), Metrics(prompt_tokens=4, completion_tokens=2))
    assert event.finished.reason == pb.FINISH_REASON_ABORT
    assert (event.finished.usage.prompt_tokens, event.finished.usage.completion_tokens) == (4, 2)


def test_a_synthetic_answer_is_marked_at_its_start() -> None:
    request = Request("r", (1,), SamplingParams(seed=1))
    marked = started_event(request, Accepted("t", 1, 1), 0.0).started
    assert (marked.HasField("synthetic_acceptance"), marked.synthetic_acceptance) == (True, 0.0)


def test_a_true_answer_bears_no_mark() -> None:
    started = started_event(Request("r", (1,), SamplingParams(seed=1)), Accepted("t", 1, 1)).started
    assert not started.HasField("synthetic_acceptance")


def test_the_start_says_why_a_request_went_where_it_went() -> None:
    started = started_event(Request("r", (1,), SamplingParams(seed=1)), Accepted("t", 1, 1, "prefix")).started
    assert started.route == "prefix"


def test_the_usage_counts_replicas_lost_on_the_way() -> None:
    (event,) = delta_events(Delta((), "", FinishReason.STOP, Metrics(resumptions=2)), Metrics())
    assert event.finished.usage.resumptions == 2


def test_a_session_without_kv_or_history_leaves_their_fields_unset() -> None:
    message = session_message(SessionInfo("s", None, 0, False))
    assert message == pb.Session(session_id="s")
