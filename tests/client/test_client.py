"""The synchronous client against the real service over scripted replicas."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from paceline.api import SessionInfo
from paceline.client import Client, Relief, Retry, Started
from paceline.errors import (
    InvalidRequest,
    Overloaded,
    PacelineError,
    RequestTimeout,
    SessionConflict,
    Unavailable,
    UnknownModel,
    UnknownSession,
)
from paceline.sessions.history import ChatMessage
from paceline.types import Delta, Failure, FinishReason, Frame, Grammar, Metrics, Request, SamplingParams, Verified
from tests.api.scripted import ACCEPTED, HELLO, METRICS, MODEL, Hang, ScriptedTargets, tokenizer
from tests.client.served import Served, served

AT_ONCE = Retry(max_attempts=3, first_s=0.0)
ONCE = Retry(max_attempts=1)


class Flaky(ScriptedTargets):
    """Plays one script after the other, the last one for ever."""

    def __init__(self, *scripts: Sequence[Frame | Exception | Hang]) -> None:
        super().__init__(scripts[0])
        self.scripts = list(scripts)

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        self.script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async for frame in super().generate(request):
            yield frame


@pytest.fixture
def server() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.address, retry=AT_ONCE) as found:
        yield found


def test_a_chat_is_answered_whole(client: Client, server: Served) -> None:
    answer = client.chat("hi", session_id="s", max_tokens=9, temperature=0.5, stop="x", logit_bias={7: 1.0})
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Hello", (10, 11, 12), FinishReason.STOP)
    assert (answer.metrics, answer.session_id, answer.seed) == (METRICS, "s", 7)
    (request,) = server.targets.requests
    assert request.token_ids == tuple(tokenizer().encode("<|user|>hi<|assistant|>"))
    assert request.params == SamplingParams(
        max_tokens=9, temperature=0.5, stop=("x",), logit_bias={7: 1.0}, seed=request.params.seed
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        [ChatMessage("system", "be brief"), "hi"],
    ],
    ids=["mappings", "data"],
)
def test_a_conversation_is_told_in_many_ways(client: Client, server: Served, messages: list[ChatMessage]) -> None:
    client.chat(messages)
    expected = tokenizer().encode("<|system|>be brief<|user|>hi<|assistant|>")
    assert server.targets.requests[0].token_ids == tuple(expected)


def test_a_stream_gives_deltas_and_then_the_answer(client: Client) -> None:
    stream = client.stream_chat("hi", session_id="s")
    started = stream.started()
    assert (started.session_id, started.replica_id, started.prompt_tokens) == ("s", "target-1", 4)
    assert list(stream) == [Delta((10, 11), "Hel"), Delta((12,), "lo"), Delta((), "", FinishReason.STOP, METRICS)]
    assert stream.answer().text == "Hello"
    assert isinstance(stream.answer().started, Started)


def test_a_delta_says_which_of_it_was_guessed() -> None:
    guessed = Delta((10, 11), "Hel", verified=Verified("remote", 3, 1, 2))
    with served(ScriptedTargets([ACCEPTED, guessed, *HELLO[2:]])) as server, Client(server.address) as client:
        assert next(client.stream_chat("hi")) == guessed


def test_a_prompt_of_token_ids_is_gone_on_from(client: Client, server: Served) -> None:
    client.generate([5, 6], grammar=Grammar("regex", "a+"), speculation=False)
    (request,) = server.targets.requests
    assert (request.token_ids, request.params.grammar, request.speculate) == ((5, 6), Grammar("regex", "a+"), False)


def test_several_outputs_have_their_own_texts_and_seeds() -> None:
    frames = [ACCEPTED, Delta((1,), "a", FinishReason.STOP), Delta((2,), "b", FinishReason.LENGTH, METRICS, index=1)]
    with served(ScriptedTargets(frames)) as server, Client(server.address) as client:
        answer = client.generate("hi", n=2)
    assert [(each.text, each.finish_reason) for each in answer.outputs] == [
        ("a", FinishReason.STOP),
        ("b", FinishReason.LENGTH),
    ]
    assert answer.outputs[0].seed == 7 != answer.outputs[1].seed
    assert isinstance(answer.outputs[0].metrics, Metrics)


def test_a_session_is_opened_talked_to_forked_and_deleted(client: Client, server: Served) -> None:
    session = client.session("trip", messages=[{"role": "system", "content": "brief"}], seed=3)
    assert (session.say("hi").text, server.targets.requests[0].params.seed) == ("Hello", 3)
    assert session.info().turns == 1
    fork = session.fork("other")
    assert fork.info().parent == "trip"
    assert [delta.text for delta in fork.stream_say("again")] == ["Hel", "lo", ""]
    assert {"trip", "other"} <= {info.session_id for info in client.sessions()}
    session.delete()
    with pytest.raises(UnknownSession):
        session.info()
    assert fork.info().turns == 2


def test_a_session_that_exists_is_gone_on_with(client: Client) -> None:
    client.session("trip").say("hi")
    assert client.session("trip").info().turns == 1


def test_a_session_without_a_name_gets_one(client: Client) -> None:
    assert client.session().session_id.startswith("sess-")


def test_a_fork_that_exists_is_a_conflict(client: Client) -> None:
    with pytest.raises(SessionConflict):
        client.session("trip").fork("trip")


def test_sessions_are_moved_and_replicas_relieved_and_drained() -> None:
    targets = ScriptedTargets()
    targets.held = [SessionInfo(f"s{n}", "target-1", n, False) for n in range(4)]
    with served(targets) as server, Client(server.address) as client:
        assert client.session("s0").move().replica_id == "target-9"
        assert client.relieve("target-1", 1) == Relief({"s1": "target-9"}, {})
        assert client.drain("target-1", wait=0) == Relief({"s2": "target-9", "s3": "target-9"}, {})


def test_text_is_tokenized_and_made_again(client: Client) -> None:
    ids = client.tokenize("hello")
    assert client.detokenize(ids) == "hello"
    assert client.tokenize([{"role": "user", "content": "hi"}]) == tuple(tokenizer().encode("<|user|>hi<|assistant|>"))


def test_the_model_and_the_status_are_told(client: Client) -> None:
    assert [(model.name, model.max_model_len) for model in client.models()] == [(MODEL, 512)]
    assert client.status().targets[0].running == 1


def test_a_request_is_aborted_by_its_id(client: Client) -> None:
    stream = client.stream_chat("hi")
    assert client.abort(stream.started().request_id) is True
    assert client.abort("unknown") is False


def test_errors_are_paceline_s_own(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="top_p") as caught:
        client.chat("hi", top_p=9.0)
    assert caught.value.param == "top_p"
    with pytest.raises(UnknownModel):
        client.chat("hi", model="other")


def test_what_no_message_can_hold_is_an_invalid_request(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        client.chat("hi", top_k=-1)
    with pytest.raises(InvalidRequest):
        client.chat("hi", max_tokens="many")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="unknown field 'text'"):
        client.chat({"role": "user", "text": "hi"})


def test_an_unknown_option_is_refused_by_name(client: Client) -> None:
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        client.chat("hi", temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=0.001), Unavailable("gone")])
def test_a_refusal_is_tried_again(error: PacelineError) -> None:
    targets = Flaky([Failure.of(error)], [Failure.of(error)], HELLO)
    with served(targets) as server, Client(server.address, retry=AT_ONCE) as client:
        assert client.chat("hi").text == "Hello"
    assert len(targets.requests) == 3


def test_a_loss_before_the_first_token_is_tried_again() -> None:
    targets = Flaky([ACCEPTED, Failure.of(Unavailable("gone"))], HELLO)
    with served(targets) as server, Client(server.address, retry=AT_ONCE) as client:
        assert client.chat("hi").text == "Hello"


def test_a_loss_after_the_first_token_is_raised() -> None:
    targets = Flaky([*HELLO[:2], Failure.of(Unavailable("gone"))], HELLO)
    with served(targets) as server, Client(server.address, retry=AT_ONCE) as client:
        stream = client.stream_chat("hi")
        assert next(stream).text == "Hel"
        with pytest.raises(Unavailable, match="gone"):
            next(stream)
    assert len(targets.requests) == 1


def test_a_wrong_request_is_not_tried_again() -> None:
    targets = Flaky([Failure.of(InvalidRequest("no"))], HELLO)
    with served(targets) as server, Client(server.address, retry=AT_ONCE) as client, pytest.raises(InvalidRequest):
        client.chat("hi")


def test_the_last_refusal_is_raised() -> None:
    targets = Flaky([Failure.of(Overloaded("full", retry_after=0.001))])
    with (
        served(targets) as server,
        Client(server.address, retry=AT_ONCE) as client,
        pytest.raises(Overloaded) as caught,
    ):
        client.chat("hi")
    assert (len(targets.requests), caught.value.retry_after) == (3, 0.001)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with Client("127.0.0.1:1", retry=ONCE) as client, pytest.raises(Unavailable, match="no server at"):
        client.models()


def test_the_time_limit_is_the_caller_s() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    with served(targets) as server, Client(server.address, retry=ONCE) as client:
        with pytest.raises(RequestTimeout):
            client.chat("hi", timeout=0.2)
        server.run(asyncio.wait_for(targets.over.wait(), 20))
    assert targets.ended == ["cancelled"]


@pytest.mark.parametrize("way", ["closed", "left", "lost"])
def test_a_stream_that_nobody_reads_any_more_ends_the_work(way: str) -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    with served(targets) as server, Client(server.address) as client:
        stream = client.stream_chat("hi")
        assert next(stream).text == "Hel"
        server.run(asyncio.wait_for(targets.hanging.wait(), 20))
        if way == "closed":
            stream.close()
        elif way == "left":
            with stream:
                pass
        else:
            del stream
            gc.collect()
        server.run(asyncio.wait_for(targets.over.wait(), 20))
    assert targets.ended == ["cancelled"]


def test_a_closed_stream_is_over(client: Client) -> None:
    stream = client.stream_chat("hi")
    next(stream)
    stream.close()
    assert list(stream) == []
