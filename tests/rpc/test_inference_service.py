"""The public gRPC service behind a real server, through the published stubs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from paceline.errors import Overloaded, PacelineError, RequestTimeout, Unavailable
from paceline.rpc.inference_service import InferenceHandlers, RpcFailed
from paceline.types import Failure
from paceline.v1 import inference_pb2 as pb
from paceline.v1 import inference_pb2_grpc as pb_grpc
from tests.api.scripted import HELLO, MODEL, Hang, ScriptedTargets, gateway, tokenizer

PATIENCE_S = 20.0
UNARY = ("Tokenize", "ListModels", "CreateSession", "ForkSession", "ListSessions", "GetSession", "CloseSession")
HI = [pb.Message(role="user", content="hi")]


class Context:
    """What Ray Serve hands a deployment: metadata in, code and details out, and no abort."""

    def __init__(self, metadata: Iterable[tuple[str, str]] = ()) -> None:
        self.metadata = list(metadata)
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


class Servicer(pb_grpc.InferenceServicer):
    """Registers the handlers with grpc.aio, as Serve's proxy does with its own server."""

    def __init__(self, handlers: InferenceHandlers) -> None:
        for name in ("Chat", "Generate"):
            setattr(self, name, self._streaming(getattr(handlers, name)))
        for name in UNARY:
            setattr(self, name, self._unary(getattr(handlers, name)))

    @staticmethod
    def _streaming(handler: Any) -> Any:
        async def method(request: Any, context: Any) -> AsyncIterator[Any]:
            ours = Context(context.invocation_metadata())
            try:
                async for event in handler(request, grpc_context=ours):
                    yield event
            except RpcFailed:
                await context.abort(ours.code, ours.details)

        return method

    @staticmethod
    def _unary(handler: Any) -> Any:
        async def method(request: Any, context: Any) -> Any:
            ours = Context(context.invocation_metadata())
            try:
                return await handler(request, grpc_context=ours)
            except RpcFailed:
                await context.abort(ours.code, ours.details)

        return method


@asynccontextmanager
async def stub_of(targets: ScriptedTargets | None = None, **options: Any) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    handlers = InferenceHandlers(gateway(targets, **options))
    pb_grpc.add_InferenceServicer_to_server(Servicer(handlers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            yield pb_grpc.InferenceStub(channel)
    finally:
        await server.stop(None)


async def chat(targets: ScriptedTargets, metadata: Any = None, **fields: Any) -> list[pb.GenerateEvent]:
    async with stub_of(targets) as stub:
        return [event async for event in stub.Chat(pb.ChatRequest(**{"messages": HI, **fields}), metadata=metadata)]


async def failed(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value.code(), caught.value.details()


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


async def test_the_error_raised_to_the_server_carries_nothing_of_the_inside() -> None:
    context = Context()
    with pytest.raises(RpcFailed) as caught:
        async for _ in InferenceHandlers(gateway(ScriptedTargets([RuntimeError("secret")]))).Chat(
            pb.ChatRequest(messages=HI), context
        ):
            pass
    assert str(caught.value) == context.details == "internal error"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


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
    events = InferenceHandlers(gateway(targets)).Chat(pb.ChatRequest(messages=HI), Context())
    await anext(events)
    await events.aclose()
    assert targets.ended == ["closed"]
