"""The same keys over gRPC: who is let in, and what one key knows of another's sessions."""

from __future__ import annotations

import grpc
import pytest

from paceline.api.gateway import Gateway
from paceline.rpc.inference_access import InferenceAccess
from paceline.rpc.inference_service import RpcFailed
from paceline.v1 import inference_pb2 as pb
from tests.api.scripted import ScriptedTargets, gateway
from tests.api.test_keys import ALICE, BOB, entry, ring
from tests.rpc.test_inference_service import HI, Context


def bearing(key: str | None) -> Context:
    return Context([] if key is None else [("authorization", f"Bearer {key}")])


def house() -> tuple[InferenceAccess, Gateway, ScriptedTargets]:
    targets = ScriptedTargets()
    front = gateway(targets)
    return InferenceAccess(front, ring(entry(ALICE, "alice", max_concurrent=1), entry(BOB, "bob"))), front, targets


@pytest.mark.parametrize("key", [None, "pl-mallory"])
def test_a_stranger_is_unauthenticated(key: str | None) -> None:
    access, _, _ = house()
    context = bearing(key)
    with pytest.raises(RpcFailed), access.admitted(context):
        raise AssertionError("let in")
    assert context.code is grpc.StatusCode.UNAUTHENTICATED
    assert "mallory" not in context.details


def test_a_call_counts_until_it_ends() -> None:
    access, _, _ = house()
    with access.admitted(bearing(ALICE)):
        context = bearing(ALICE)
        with pytest.raises(RpcFailed), access.admitted(context):
            raise AssertionError("let in")
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with access.admitted(bearing(ALICE)):
        pass


async def test_a_session_is_its_own_key_s_alone() -> None:
    access, _, targets = house()
    with access.admitted(bearing(ALICE)) as mine:
        await mine.CreateSession(pb.CreateSessionRequest(session_id="diary"), bearing(ALICE))
        chat = pb.ChatRequest(session_id="diary", append=True, messages=HI)
        assert [event async for event in mine.Chat(chat, bearing(ALICE))]
    assert targets.requests[0].session_id == "~alice/diary"
    with access.admitted(bearing(BOB)) as theirs:
        assert not (await theirs.ListSessions(pb.ListSessionsRequest(), bearing(BOB))).sessions
        for call in (
            lambda context: theirs.GetSession(pb.GetSessionRequest(session_id="diary"), context),
            lambda context: theirs.ForkSession(pb.ForkSessionRequest(session_id="diary"), context),
            lambda context: theirs.CloseSession(pb.CloseSessionRequest(session_id="diary"), context),
            lambda context: anext(theirs.Chat(chat, context)),
        ):
            context = bearing(BOB)
            with pytest.raises(RpcFailed):
                await call(context)
            assert context.code is grpc.StatusCode.NOT_FOUND


async def test_without_keys_everybody_is_let_in() -> None:
    with InferenceAccess(gateway(), None).admitted(Context()) as handlers:
        assert (await handlers.ListModels(pb.ListModelsRequest(), Context())).models
