"""The front end without a transport: checking, tokenizing, naming."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest

from paceline.api import gateway as gateway_module
from paceline.api.prompts import INLINE_CHARS, ChatMessage, PromptEncoder
from paceline.errors import InvalidRequest, PacelineError, RequestTimeout, UnknownModel, UnknownSession
from paceline.sessions.rules import WindowRules
from paceline.sessions.window import StreamingWindow
from paceline.types import MAX_TOKENS, SamplingParams
from tests.api.scripted import CONTEXT, MODEL, ScriptedTargets, gateway, tokenizer

HI = [ChatMessage("user", "hi")]
FREE = SamplingParams(max_tokens=None)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


async def test_a_conversation_is_rendered_and_ends_where_the_answer_begins() -> None:
    messages = [ChatMessage("system", "be brief"), ChatMessage("user", "hi")]
    request = (await gateway().prepare_chat(messages, FREE)).request
    assert request.token_ids == ids("<|system|>be brief<|user|>hi<|assistant|>")


async def test_developer_is_the_later_word_for_system() -> None:
    request = (await gateway().prepare_chat([ChatMessage("developer", "be brief"), *HI], FREE)).request
    assert request.token_ids == ids("<|system|>be brief<|user|>hi<|assistant|>")


async def test_a_prompt_is_encoded_as_the_tokenizer_does() -> None:
    assert (await gateway().prepare_completion("hi", FREE)).request.token_ids == ids("hi")


async def test_token_ids_pass_as_they_are() -> None:
    assert (await gateway().prepare_completion([5, 6, 261], FREE)).request.token_ids == (5, 6, 261)


async def test_a_list_from_an_older_apply_chat_template_is_taken_too() -> None:
    class Older:
        chat_template = "…"
        all_special_ids = (1,)

        def apply_chat_template(self, conversation: object, *, tokenize: bool, add_generation_prompt: bool) -> object:
            return [1, 2, 3]

        def encode(self, text: str) -> list[int]:
            return [1]

        def get_vocab(self) -> dict[str, int]:
            return {"a": 9}

    assert await PromptEncoder(Older()).chat(HI) == (1, 2, 3)


async def test_a_model_without_a_chat_template_says_so() -> None:
    class Bare:
        all_special_ids = ()
        chat_template = None

        def apply_chat_template(self, conversation: object, *, tokenize: bool, add_generation_prompt: bool) -> object:
            raise AssertionError

        def encode(self, text: str) -> list[int]:
            return [1]

        def get_vocab(self) -> dict[str, int]:
            return {"a": 9}

    with pytest.raises(InvalidRequest, match="no chat template"):
        await PromptEncoder(Bare()).chat(HI)


async def test_a_long_text_is_tokenized_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threaded = []

    async def to_thread(work: object) -> object:
        threaded.append(work)
        return work()  # type: ignore[operator]

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    await gateway().tokenize("x" * INLINE_CHARS)
    assert len(threaded) == 0
    await gateway().tokenize("x" * (INLINE_CHARS + 1))
    assert len(threaded) == 1


async def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=re.escape("messages.0.content: not valid Unicode at character 1")):
        await gateway().prepare_chat([ChatMessage("user", "a\ud800")], FREE)
    with pytest.raises(InvalidRequest, match="prompt: not valid Unicode"):
        await gateway().prepare_completion("\ud800", FREE)


@pytest.mark.parametrize("name", [MODEL, "", None])
async def test_the_served_model_may_be_left_unnamed(name: str | None) -> None:
    assert (await gateway().prepare_chat(HI, FREE, model=name)).request.token_ids == ids("<|user|>hi<|assistant|>")


async def test_a_priority_that_has_no_effect_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"priority: 2 .*target\.engine\.scheduling_policy: priority$") as caught:
        await gateway().prepare_chat(HI, FREE, priority=2)
    assert caught.value.param == "priority"


async def test_an_unknown_model_is_named_with_the_one_served() -> None:
    with pytest.raises(UnknownModel, match=r"'other'.*'tiny'") as caught:
        await gateway().prepare_chat(HI, FREE, model="other")
    assert caught.value.param == "model"


async def test_no_limit_means_the_rest_of_the_context() -> None:
    request = (await gateway().prepare_completion([9] * 500, FREE)).request
    assert request.params.max_tokens == CONTEXT - 500


async def test_the_default_limit_shrinks_to_the_rest_of_the_context() -> None:
    request = (await gateway().prepare_completion([9] * 500, FREE, default_max_tokens=16)).request
    assert request.params.max_tokens == 12


async def test_under_a_window_neither_prompt_nor_output_is_bounded_by_the_context() -> None:
    params = SamplingParams(max_tokens=None, ctx_size=64)
    request = (await gateway().prepare_completion([9] * 1000, params)).request
    assert (request.params.max_tokens, request.params.window) == (MAX_TOKENS - 1000, StreamingWindow(64))
    request = (await gateway().prepare_completion([9] * 1000, params, default_max_tokens=16)).request
    assert request.params.max_tokens == 16
    request = (await gateway().prepare_completion([9] * 5, replace(params, max_tokens=20_000))).request
    assert request.params.max_tokens == 20_000


async def test_the_server_s_window_holds_for_requests_without_one() -> None:
    windows = WindowRules(CONTEXT, 64, 2, 8)
    request = (await gateway(windows=windows).prepare_chat(HI, SamplingParams(n_discard=9))).request
    assert request.params.window == StreamingWindow(64, 2, 9)


async def test_a_model_that_cannot_shift_refuses_a_window_with_the_reason() -> None:
    windows = WindowRules(CONTEXT, refusal="opt has learned positions")
    with pytest.raises(InvalidRequest, match=r"ctx_size: no streaming window .*: opt has") as caught:
        await gateway(windows=windows).prepare_chat(HI, SamplingParams(ctx_size=64))
    assert caught.value.param == "ctx_size"
    request = (await gateway(windows=windows).prepare_chat(HI, SamplingParams(max_tokens=5))).request
    assert request.params.window is None


async def test_the_largest_limit_that_fits_is_accepted() -> None:
    request = (await gateway().prepare_completion([9] * 500, SamplingParams(max_tokens=12))).request
    assert request.params.max_tokens == 12


async def test_prompt_and_output_beyond_the_context_are_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"13 and a prompt of 500 tokens exceed .* 512; at most 12 fit") as caught:
        await gateway().prepare_completion([9] * 500, SamplingParams(max_tokens=13))
    assert caught.value.param == "max_tokens"


async def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: 512 tokens .* context of 512"):
        await gateway().prepare_completion([9] * 512, FREE, default_max_tokens=16)


async def test_every_request_has_a_seed_and_an_id_of_its_own() -> None:
    first = (await gateway().prepare_chat(HI, FREE)).request
    second = (await gateway().prepare_chat(HI, FREE)).request
    assert first.params.seed is not None
    assert first.params.seed != second.params.seed
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", first.request_id)
    assert first.request_id != second.request_id


async def test_a_given_seed_is_kept() -> None:
    assert (await gateway().prepare_chat(HI, SamplingParams(seed=5))).request.params.seed == 5


async def test_a_completion_has_a_session_only_if_named() -> None:
    assert (await gateway().prepare_completion("hi", FREE)).request.session_id is None
    assert (await gateway().prepare_completion("hi", FREE, session_id="s")).request.session_id == "s"


async def test_the_clients_session_id_wins() -> None:
    assert (await gateway().prepare_chat(HI, FREE, session_id="会话 1")).request.session_id == "会话 1"


async def test_an_unknown_session_is_not_found() -> None:
    with pytest.raises(UnknownSession, match="'nobody'"):
        await gateway().session("nobody")
    with pytest.raises(UnknownSession, match="'nobody'"):
        await gateway().close_session("nobody")


async def test_a_question_to_the_replicas_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(ScriptedTargets):
        async def status(self) -> None:  # type: ignore[override]
            await asyncio.Event().wait()

    monkeypatch.setattr(gateway_module, "CONTROL_TIMEOUT_S", 0.01)
    with pytest.raises(RequestTimeout):
        await gateway(Silent()).status()


@pytest.mark.parametrize("text", ["messages: a", "x" * 300])
async def test_a_refusal_does_not_echo_a_whole_input(text: str) -> None:
    with pytest.raises(PacelineError) as caught:
        await gateway().prepare_chat(HI, FREE, model=text)
    assert len(caught.value.message) < 200


async def test_more_messages_than_are_taken_are_refused_whoever_brings_them() -> None:
    encoder = PromptEncoder(tokenizer(), max_messages=2, max_chars=10)
    with pytest.raises(InvalidRequest, match="messages: at most 2 in one request, got 3"):
        await encoder.chat([*HI, *HI, *HI])
    with pytest.raises(InvalidRequest, match="messages: 11 characters are more than are taken here, 10"):
        await encoder.chat([ChatMessage("user", "x" * 11)])
