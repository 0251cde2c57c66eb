"""The public gRPC service behind a real server, through the published stubs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from paceline.api import ClusterStatus, SessionInfo
from paceline.errors import (
    InvalidRequest,
    Overloaded,
    PacelineError,
    RequestTimeout,
    SessionConflict,
    Unavailable,
    UnknownSession,
)
from paceline.rpc.inference_server import MAX_MESSAGE_BYTES
from paceline.rpc.inference_service import InferenceHandlers
from paceline.sessions.handoff import BUSY, Outcome
from paceline.types import Delta, Failure, FinishReason
from paceline.v1 import inference_pb2 as pb
from tests.api.scripted import ACCEPTED, HELLO, MODEL, Hang, ScriptedTargets, gateway, tokenizer
from tests.rpc.served import OPTIONS, failed, refused, serving, stub_of

PATIENCE_S = 20.0
HI = [pb.Message(role="user", content="hi")]


async def chat(targets: ScriptedTargets, metadata: Any = None, **fields: Any) -> list[pb.GenerateEvent]:
    async with stub_of(targets) as stub:
        return [event async for event in stub.Chat(pb.ChatRequest(**{"messages": HI, **fields}), metadata=metadata)]


async def test_a_chat_is_started_then_tokens_then_finished() -> None:
    events = await chat(ScriptedTargets(), model=MODEL, session_id="s")
    assert [event.WhichOneof("event") for event in events] == ["started", "tokens", "tokens", "finished"]
    started = events[0].started
    assert started.request_id.startswith("chatcmpl-")
    assert (started.session_id, started.replica_id, started.seed) == ("s", "target-1", 7)
    assert [(list(event.tokens.token_ids), event.tokens.text) for event in events[1:3]] == [
        ([10, 11], "Hel"),
        ([12], "lo"),
    ]
    assert events[3].finished == pb.Finished(
        reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(
            prompt_tokens=4,
            cached_tokens=2,
            completion_tokens=3,
            drafted_tokens=2,
            accepted_tokens=1,
            late_drafts=1,
            steps=2,
            queue_seconds=0.125,
            ttft_seconds=0.25,
            total_seconds=0.5,
            wasted_drafts=1,
            sources=[pb.SourceUsage(source="remote", drafted=[1, 1], accepted=[1, 0], wasted=1)],
        ),
    )


async def test_a_chat_is_the_same_request_as_over_http() -> None:
    targets = ScriptedTargets()
    (started, *_) = await chat(targets)
    request = targets.requests[0]
    assert request.token_ids == tuple(tokenizer().encode("<|user|>hi<|assistant|>"))
    assert request.params.max_tokens == 512 - len(request.token_ids)
    assert request.speculate is True
    assert started.started.prompt_tokens == len(request.token_ids)
    assert started.started.session_id.startswith("conv-")


async def test_a_prompt_of_text_or_token_ids_is_generated_from() -> None:
    targets = ScriptedTargets()
    async with stub_of(targets) as stub:
        for prompt in ({"text": "hi"}, {"token_ids": pb.TokenIds(ids=[5, 6])}):
            events = [event async for event in stub.Generate(pb.GenerateRequest(**prompt, speculation=False))]
            assert events[0].started.session_id == ""
    first, second = targets.requests
    assert (first.token_ids, second.token_ids) == (tuple(tokenizer().encode("hi")), (5, 6))
    assert first.speculate is False


async def test_a_priority_reaches_the_replica_where_the_policy_is_priority() -> None:
    targets = ScriptedTargets()
    async with stub_of(targets, scheduling_policy="priority") as stub:
        [_ async for _ in stub.Chat(pb.ChatRequest(messages=HI, priority=-3))]
        for fields in ({"priority": 5}, {}):
            [_ async for _ in stub.Generate(pb.GenerateRequest(text="hi", **fields))]
    assert [request.priority for request in targets.requests] == [-3, 5, 0]


@pytest.mark.parametrize("key", ["x-session-id", "session_id"])
async def test_the_session_may_be_named_in_the_metadata(key: str) -> None:
    events = await chat(ScriptedTargets(), metadata=((key, "mine"),))
    assert events[0].started.session_id == "mine"


async def test_the_field_names_the_session_before_the_metadata() -> None:
    events = await chat(ScriptedTargets(), metadata=(("x-session-id", "mine"),), session_id="field")
    assert events[0].started.session_id == "field"


async def test_text_and_conversations_are_tokenized() -> None:
    async with stub_of() as stub:
        text = await stub.Tokenize(pb.TokenizeRequest(text="hi"))
        conversation = await stub.Tokenize(pb.TokenizeRequest(messages=pb.Messages(messages=HI)))
    assert list(text.token_ids) == tokenizer().encode("hi")
    assert list(conversation.token_ids) == tokenizer().encode("<|user|>hi<|assistant|>")


async def test_the_model_is_listed() -> None:
    async with stub_of() as stub:
        listed = await stub.ListModels(pb.ListModelsRequest())
    assert list(listed.models) == [pb.Model(name=MODEL, max_model_len=512)]


async def test_turns_are_appended_to_a_session_and_to_its_fork() -> None:
    targets = ScriptedTargets()
    async with stub_of(targets) as stub:
        created = await stub.CreateSession(pb.CreateSessionRequest(session_id="s", messages=HI[:0], seed=5))
        first = [event async for event in stub.Chat(pb.ChatRequest(messages=HI, session_id="s", append=True))]
        fork = await stub.ForkSession(pb.ForkSessionRequest(session_id="s", fork_id="t"))
        [event async for event in stub.Chat(pb.ChatRequest(messages=HI, session_id="t", append=True))]
        again = await failed(stub.CreateSession(pb.CreateSessionRequest(session_id="s")))
    ours, theirs = targets.requests
    assert (created.session_id, created.replica_id, created.turns, created.HasField("parent")) == ("s", "", 0, False)
    assert (first[0].started.session_id, ours.params.seed) == ("s", 5)
    assert (fork.session_id, fork.parent, fork.turns, fork.history_tokens) == ("t", "s", 1, len(ours.token_ids) + 3)
    assert theirs.token_ids[: fork.history_tokens] == (*ours.token_ids, 10, 11, 12)
    assert again == (grpc.StatusCode.ABORTED, "session_id: 's' exists already")


async def test_appending_needs_a_session() -> None:
    async with stub_of() as stub:
        unnamed = await failed(stub.Chat(pb.ChatRequest(messages=HI, append=True)))
        unknown = await failed(stub.Chat(pb.ChatRequest(messages=HI, append=True, session_id="x")))
    assert unnamed[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert unknown[0] is grpc.StatusCode.NOT_FOUND


async def test_sessions_are_listed_found_and_closed() -> None:
    async with stub_of() as stub:
        listed = await stub.ListSessions(pb.ListSessionsRequest())
        found = await stub.GetSession(pb.GetSessionRequest(session_id="s/1"))
        await stub.CloseSession(pb.CloseSessionRequest(session_id="s/1"))
        left = await stub.ListSessions(pb.ListSessionsRequest())
        gone = await failed(stub.GetSession(pb.GetSessionRequest(session_id="s/1")))
        again = await failed(stub.CloseSession(pb.CloseSessionRequest(session_id="s/1")))
    assert found == pb.Session(session_id="s/1", replica_id="target-1", cached_tokens=40, running=True)
    assert [session.session_id for session in listed.sessions] == ["s/1", "s2"]
    assert [session.session_id for session in left.sessions] == ["s2"]
    assert gone == again == (grpc.StatusCode.NOT_FOUND, "session_id: nobody holds a session 's/1'")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [pb.Message(role="robot", content="hi")]}, "messages.0.role"),
        ({"messages": [pb.Message(role="user", content="x" * 600)]}, "messages"),
        ({"sampling": pb.SamplingParams(max_tokens=0)}, "max_tokens"),
        ({"sampling": pb.SamplingParams(max_tokens=4000)}, "max_tokens"),
        ({"sampling": pb.SamplingParams(top_p=float("nan"))}, "top_p"),
        ({"sampling": pb.SamplingParams(stop=[""])}, "stop"),
        ({"sampling": pb.SamplingParams(stop_token_ids=[9999])}, "stop_token_ids"),
        ({"session_id": "a\nb"}, "session_id"),
        ({"priority": 1}, "priority"),
    ],
)
async def test_bad_input_is_an_invalid_argument_that_names_its_field(fields: dict[str, Any], named: str) -> None:
    async with stub_of() as stub:
        code, details = await failed(stub.Chat(pb.ChatRequest(**{"messages": HI, **fields})))
    assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, named)


@pytest.mark.parametrize("ids", [[], [262]])
async def test_bad_token_ids_name_the_prompt(ids: list[int]) -> None:
    async with stub_of() as stub:
        code, details = await failed(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))))
    assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")


async def test_an_unknown_model_is_not_found() -> None:
    async with stub_of() as stub:
        code, details = await failed(stub.Chat(pb.ChatRequest(messages=HI, model="other")))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "model: no model 'other' here; 'tiny' is served")


@pytest.mark.parametrize("before", [[], HELLO[:2]], ids=["on opening", "in the middle"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("replica died"), grpc.StatusCode.UNAVAILABLE),
        (RequestTimeout("too slow"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_a_failure_has_its_code(before: list[Any], error: PacelineError, code: grpc.StatusCode) -> None:
    async with stub_of(ScriptedTargets([*before, Failure.of(error)])) as stub:
        assert await failed(stub.Chat(pb.ChatRequest(messages=HI))) == (code, error.message)


async def test_an_unexpected_error_says_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with stub_of(ScriptedTargets([RuntimeError("secret")])) as stub:
            assert await failed(stub.Chat(pb.ChatRequest(messages=HI))) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "secret" in caplog.text


async def test_the_deadline_of_the_request_ends_the_work() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with stub_of(targets, timeout_s=0.01) as stub:
        code, _ = await failed(stub.Chat(pb.ChatRequest(messages=HI)))
    assert (code, targets.ended) == (grpc.StatusCode.DEADLINE_EXCEEDED, ["cancelled"])


async def test_a_client_that_cancels_ends_the_work() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with stub_of(targets) as stub:
        call = stub.Chat(pb.ChatRequest(messages=HI))
        await call.read()
        await targets.hanging.wait()
        call.cancel()
        await asyncio.wait_for(targets.over.wait(), PATIENCE_S)
    assert targets.ended == ["cancelled"]


async def test_closing_the_handlers_generator_closes_the_replicas() -> None:
    targets = ScriptedTargets()
    context = Mock(**{"invocation_metadata.return_value": ()})
    events = InferenceHandlers(gateway(targets)).Chat(pb.ChatRequest(messages=HI), context)
    await anext(events)
    await events.aclose()
    assert targets.ended == ["closed"]


async def test_a_stream_that_fails_says_so_in_an_event_and_in_its_status() -> None:
    async with stub_of(ScriptedTargets([*HELLO[:2], Failure.of(Overloaded("full", retry_after=2.5))])) as stub:
        call = stub.Chat(pb.ChatRequest(messages=HI))
        events = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in call:
                events.append(event)  # noqa: PERF401 (the ones before the error count)
    assert events[-1].failed == pb.Failed(code="rate_limit_exceeded", message="full", retry_after_seconds=2.5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_error_tells_its_code_field_and_pause_in_its_details() -> None:
    async with stub_of(ScriptedTargets([Failure.of(Overloaded("full", retry_after=2.5))])) as stub:
        full = await refused(stub.Chat(pb.ChatRequest(messages=HI)))
        wrong = await refused(stub.Chat(pb.ChatRequest(messages=HI, sampling=pb.SamplingParams(top_p=7))))
        unknown = await refused(stub.GetSession(pb.GetSessionRequest(session_id="x")))
    assert (type(full), full.retry_after, full.param) == (Overloaded, 2.5, None)
    assert (type(wrong), wrong.param, wrong.retry_after) == (InvalidRequest, "top_p", None)
    assert (type(unknown), unknown.param) == (UnknownSession, "session_id")


async def test_a_message_of_any_length_reaches_the_client_cut() -> None:
    async with stub_of(ScriptedTargets([Failure.of(Unavailable("é" * 100_000))])) as stub:
        error = await refused(stub.Chat(pb.ChatRequest(messages=HI)))
    assert (type(error), error.message) == (Unavailable, "é" * 510 + "…")


async def test_the_client_s_own_limit_ends_the_work() -> None:
    for fields, metadata in (({"timeout_seconds": 0.01}, ()), ({}, (("x-request-timeout", "0.01"),))):
        targets = ScriptedTargets([*HELLO[:2], Hang()])
        async with stub_of(targets) as stub:
            code, details = await failed(stub.Chat(pb.ChatRequest(messages=HI, **fields), metadata=metadata))
        assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the request took longer than 0.01 s")
        assert targets.ended == ["cancelled"]


async def test_the_server_s_limit_holds_for_who_asks_for_more() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with stub_of(targets, timeout_s=0.01) as stub:
        code, _ = await failed(stub.Generate(pb.GenerateRequest(text="hi", timeout_seconds=1e9)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_limit_that_is_no_time_is_refused(given: float) -> None:
    async with stub_of() as stub:
        error = await refused(stub.Chat(pb.ChatRequest(messages=HI, timeout_seconds=given)))
    assert (type(error), error.param) == (InvalidRequest, "timeout_seconds")


async def test_a_limit_in_the_metadata_that_is_no_number_is_refused() -> None:
    async with stub_of() as stub:
        error = await refused(stub.Chat(pb.ChatRequest(messages=HI), metadata=(("x-request-timeout", "soon"),)))
    assert (type(error), error.param) == (InvalidRequest, "x-request-timeout")


async def test_the_deadline_of_the_call_ends_the_work() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with stub_of(targets) as stub:
        code, _ = await failed(stub.Chat(pb.ChatRequest(messages=HI), timeout=0.3))
        await asyncio.wait_for(targets.over.wait(), PATIENCE_S)
    assert (code, targets.ended) == (grpc.StatusCode.DEADLINE_EXCEEDED, ["cancelled"])


async def test_a_request_is_aborted_by_its_id() -> None:
    targets = ScriptedTargets()
    async with stub_of(targets) as stub:
        events = [event async for event in stub.Chat(pb.ChatRequest(messages=HI))]
        known = await stub.Abort(pb.AbortRequest(request_id=events[0].started.request_id))
        unknown = await stub.Abort(pb.AbortRequest(request_id="chatcmpl-x"))
        unnamed = await refused(stub.Abort(pb.AbortRequest()))
    assert (known.aborted, unknown.aborted, unnamed.param) == (True, False, "request_id")


async def test_an_aborted_output_finishes_as_such() -> None:
    async with stub_of(ScriptedTargets([ACCEPTED, Delta((), "", FinishReason.ABORT)])) as stub:
        events = [event async for event in stub.Chat(pb.ChatRequest(messages=HI))]
    assert events[-1].finished.reason == pb.FINISH_REASON_ABORT


async def test_token_ids_become_text_again() -> None:
    async with stub_of() as stub:
        ids = (await stub.Tokenize(pb.TokenizeRequest(text="hä?"))).token_ids
        back = await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        wrong = await refused(stub.Detokenize(pb.DetokenizeRequest(token_ids=[262])))
    assert (back.text, wrong.param) == ("hä?", "token_ids")


async def test_a_session_is_moved() -> None:
    async with stub_of() as stub:
        moved = await stub.MoveSession(pb.MoveSessionRequest(session_id="s2"))
        busy = await refused(stub.MoveSession(pb.MoveSessionRequest(session_id="s/1")))
    assert (moved.replica_id, type(busy)) == ("target-9", SessionConflict)


async def test_a_replica_is_relieved_of_sessions() -> None:
    async with stub_of() as stub:
        relief = await stub.Relieve(pb.RelieveRequest(replica_id="target-2", sessions=1))
        none = await refused(stub.Relieve(pb.RelieveRequest(replica_id="target-2")))
        unknown = await refused(stub.Relieve(pb.RelieveRequest(replica_id="x", sessions=1)))
    assert dict(relief.moved) == {"s2": "target-9"}
    assert (none.param, unknown.param) == ("sessions", "replica_id")
    assert unknown.message == "replica_id: no target replica 'x' here"


async def test_a_replica_is_drained_of_what_is_idle_at_the_deadline() -> None:
    targets = ScriptedTargets()
    targets.held.append(SessionInfo("s3", "target-1", 5, False))
    async with stub_of(targets) as stub:
        drained = await stub.Drain(pb.DrainRequest(replica_id="target-1", timeout_seconds=0))
    assert (dict(drained.moved), dict(drained.stay)) == ({"s3": "target-9"}, {"s/1": BUSY})


async def test_a_drain_waits_for_a_turn_under_way() -> None:
    class Ending(ScriptedTargets):
        async def hand_off(self, *args: Any, **options: Any) -> Outcome | None:
            outcome = await super().hand_off(*args, **options)
            self.held = [replace(session, running=False) for session in self.held]
            return outcome

    async with stub_of(Ending()) as stub:
        drained = await stub.Drain(pb.DrainRequest(replica_id="target-1"))
    assert (dict(drained.moved), dict(drained.stay)) == ({"s/1": "target-9"}, {})


async def test_the_status_has_counts_and_everything_else() -> None:
    speculation = {"late": 3, "sources": {"remote": {"drafted": [4, 2], "accepted": [3, 1], "wasted": 5}}}
    target = {"replica_id": "t", "running": 2, "warnings": ["slow"], "speculation": speculation, "ranks": None}
    targets = ScriptedTargets()
    targets.cluster = ClusterStatus((target,), ({"replica_id": "d", "load": 0.5},), {"holder": 4}, 1)
    async with stub_of(targets) as stub:
        status = await stub.Status(pb.StatusRequest())
    (told,) = status.targets
    assert (status.model, told.running, told.late_drafts, list(told.warnings)) == (MODEL, 2, 3, ["slow"])
    assert list(told.sources) == [pb.SourceCounts(source="remote", drafted=[4, 2], accepted=[3, 1], wasted=5)]
    assert MessageToDict(told.details) == target
    assert MessageToDict(status.drafts[0].details) == {"replica_id": "d", "load": 0.5}
    assert (dict(status.router.routes), status.router.resumptions) == ({}, 0)  # its own, nothing seen yet


async def test_a_replica_of_another_version_is_told_of_as_far_as_it_goes() -> None:
    targets = ScriptedTargets()
    targets.cluster = ClusterStatus(({"running": "many", "speculation": [1], "warnings": 7, "sessions": -1},))
    async with stub_of(targets) as stub:
        (told,) = (await stub.Status(pb.StatusRequest())).targets
    assert (told.replica_id, told.running, told.sessions, list(told.warnings)) == ("", 0, 0, [])


async def test_a_grammar_reaches_the_replica() -> None:
    targets = ScriptedTargets()
    async with stub_of(targets) as stub:
        for grammar in (pb.Grammar(json_schema="{}"), pb.Grammar(regex="a+"), pb.Grammar(lark='start: "a"')):
            sampling = pb.SamplingParams(grammar=grammar)
            [_ async for _ in stub.Generate(pb.GenerateRequest(text="hi", sampling=sampling))]
        empty = pb.SamplingParams(grammar=pb.Grammar())
        refusal = await refused(stub.Generate(pb.GenerateRequest(text="hi", sampling=empty)))
    found = [(request.params.grammar.kind, request.params.grammar.source) for request in targets.requests]
    assert found == [("json_schema", "{}"), ("regex", "a+"), ("lark", 'start: "a"')]
    assert refusal.param == "grammar"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": HI * 5000}, "messages"),
        ({"messages": HI, "sampling": pb.SamplingParams(stop_token_ids=range(1 << 21))}, "stop_token_ids"),
    ],
)
async def test_more_entries_than_anybody_needs_are_refused_uncounted(fields: dict[str, Any], named: str) -> None:
    async with stub_of() as stub:
        error = await refused(stub.Chat(pb.ChatRequest(**fields)))
    assert (type(error), error.param) == (InvalidRequest, named)


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"\x0a\xff\xff", b"\x12\x04\x12\x02\xc3\x28", b"\x0a\x02\xed\xa0"],
    ids=["wrong tag", "truncated", "text in a message that is not UTF-8", "half a surrogate pair"],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(raw: bytes) -> None:
    async with serving(InferenceHandlers(gateway())) as address, grpc.aio.insecure_channel(address, OPTIONS) as channel:
        for name in ("Chat", "Tokenize"):
            many = channel.unary_stream if name == "Chat" else channel.unary_unary
            error = await refused(many(f"/paceline.v1.Inference/{name}")(raw))
            assert (type(error), error.message.partition(" not ")[0]) == (InvalidRequest, "the request is")


async def test_a_request_that_is_too_large_is_not_parsed() -> None:
    async with serving(InferenceHandlers(gateway())) as address, grpc.aio.insecure_channel(address, OPTIONS) as channel:
        error = await refused(channel.unary_unary("/paceline.v1.Inference/Tokenize")(bytes(MAX_MESSAGE_BYTES + 1)))
    assert (type(error), "at most" in error.message) == (InvalidRequest, True)


def test_the_handlers_are_the_methods_of_the_proto() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods}
    assert {name for name in vars(InferenceHandlers) if name[0].isupper()} == methods
