"""The same keys over gRPC: who is let in, and what one key knows of another's sessions."""

from __future__ import annotations

import grpc
import pytest

from paceline.api.gateway import Gateway
from paceline.rpc.inference_access import InferenceAccess
from paceline.rpc.inference_service import InferenceHandlers
from paceline.v1 import inference_pb2 as pb
from tests.api.scripted import ScriptedTargets, gateway
from tests.api.test_keys import ALICE, BOB, entry, ring
from tests.rpc.test_inference_service import HI, Context

MODELS = pb.ListModelsRequest()


def bearing(key: str | None) -> Context:
    return Context([] if key is None else [("authorization", f"Bearer {key}")])


def house() -> tuple[InferenceAccess, Gateway, ScriptedTargets]:
    targets = ScriptedTargets()
    front = gateway(targets)
    return InferenceAccess(front, ring(entry(ALICE, "alice", max_concurrent=1), entry(BOB, "bob"))), front, targets


@pytest.mark.parametrize("key", [None, "pl-mallory"])
async def test_a_stranger_is_unauthenticated(key: str | None) -> None:
    access, _, _ = house()
    context = bearing(key)
    answer = await access.answer(InferenceHandlers.ListModels, MODELS, context)
    assert (context.code, list(answer.models)) == (grpc.StatusCode.UNAUTHENTICATED, [])
    assert "mallory" not in context.details


async def test_a_stranger_s_stream_is_unauthenticated() -> None:
    access, _, targets = house()
    context = bearing(None)
    events = [event async for event in access.stream(InferenceHandlers.Chat, pb.ChatRequest(messages=HI), context)]
    assert (context.code, len(events), targets.requests) == (grpc.StatusCode.UNAUTHENTICATED, 1, [])


async def test_a_call_counts_until_it_ends() -> None:
    access, _, _ = house()
    stream = access.stream(InferenceHandlers.Chat, pb.ChatRequest(messages=HI), bearing(ALICE))
    await anext(stream)
    context = bearing(ALICE)
    await access.answer(InferenceHandlers.ListModels, MODELS, context)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await stream.aclose()
    assert (await access.answer(InferenceHandlers.ListModels, MODELS, bearing(ALICE))).models


async def test_a_session_is_its_own_key_s_alone() -> None:
    access, _, targets = house()
    diary = pb.CreateSessionRequest(session_id="diary")
    await access.answer(InferenceHandlers.CreateSession, diary, bearing(ALICE))
    chat = pb.ChatRequest(session_id="diary", append=True, messages=HI)
    assert [event async for event in access.stream(InferenceHandlers.Chat, chat, bearing(ALICE))]
    assert targets.requests[0].session_id == "~alice/diary"
    listed = await access.answer(InferenceHandlers.ListSessions, pb.ListSessionsRequest(), bearing(BOB))
    assert not listed.sessions


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        (InferenceHandlers.GetSession, pb.GetSessionRequest(session_id="diary")),
        (InferenceHandlers.ForkSession, pb.ForkSessionRequest(session_id="diary")),
        (InferenceHandlers.CloseSession, pb.CloseSessionRequest(session_id="diary")),
    ],
)
async def test_another_key_s_session_is_not_found(method: object, request_: object) -> None:
    access, _, _ = house()
    diary = pb.CreateSessionRequest(session_id="diary")
    await access.answer(InferenceHandlers.CreateSession, diary, bearing(ALICE))
    context = bearing(BOB)
    await access.answer(method, request_, context)  # type: ignore[arg-type]
    assert context.code is grpc.StatusCode.NOT_FOUND


async def test_without_keys_everybody_is_let_in() -> None:
    access = InferenceAccess(gateway(), None)
    assert (await access.answer(InferenceHandlers.ListModels, MODELS, Context())).models
