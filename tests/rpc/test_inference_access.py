"""The same keys over gRPC: who is let in, and what one key knows of another's sessions."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import pytest

from paceline.api.gateway import Gateway
from paceline.errors import Forbidden, Overloaded, PacelineError, Unauthorized
from paceline.rpc.inference_access import InferenceAccess
from paceline.rpc.inference_service import InferenceHandlers
from paceline.rpc.rich_errors import error_of
from paceline.v1 import inference_pb2 as pb
from tests.api.scripted import ScriptedTargets, gateway
from tests.api.test_keys import ALICE, BOB, entry, ring
from tests.rpc.test_inference_service import HI


class Context:
    """What a server hands a handler: metadata in; code, details and trailing metadata out."""

    def __init__(self, metadata: Iterable[tuple[str, str]] = ()) -> None:
        self._metadata = list(metadata)
        self.code: grpc.StatusCode | None = None
        self.error: PacelineError | None = None
        self._details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, bytes]]) -> None:
        assert self.code is not None
        self.error = error_of(self.code, self._details, trailing_metadata)


def bearing(key: str | None) -> Context:
    return Context([] if key is None else [("authorization", f"Bearer {key}")])


async def chat(handlers: InferenceHandlers, context: Context) -> None:
    [_ async for _ in handlers.Chat(pb.ChatRequest(messages=HI), context)]


def house() -> tuple[InferenceAccess, Gateway, ScriptedTargets]:
    targets = ScriptedTargets()
    front = gateway(targets)
    return InferenceAccess(front, ring(entry(ALICE, "alice", max_concurrent=1), entry(BOB, "bob"))), front, targets


@pytest.mark.parametrize("key", [None, "pl-mallory"])
async def test_a_stranger_is_unauthenticated(key: str | None) -> None:
    access, _, targets = house()
    for ask in (lambda handlers, context: handlers.ListModels(pb.ListModelsRequest(), context), chat):
        context = bearing(key)
        with access.admitted(context) as handlers:
            await ask(handlers, context)
        assert context.code is grpc.StatusCode.UNAUTHENTICATED
        assert isinstance(context.error, Unauthorized)
        assert "mallory" not in context.error.message
    assert targets.requests == []


async def test_a_call_counts_until_it_ends() -> None:
    access, _, _ = house()
    with access.admitted(bearing(ALICE)):
        context = bearing(ALICE)
        with access.admitted(context) as handlers:
            assert not (await handlers.ListModels(pb.ListModelsRequest(), context)).models
        assert isinstance(context.error, Overloaded)
    context = bearing(ALICE)
    with access.admitted(context) as handlers:
        assert (await handlers.ListModels(pb.ListModelsRequest(), context)).models


async def test_replicas_are_an_admin_s_business() -> None:
    access, _, _ = house()
    for name, request in (
        ("Status", pb.StatusRequest()),
        ("Relieve", pb.RelieveRequest(replica_id="target-1", sessions=1)),
        ("Drain", pb.DrainRequest(replica_id="target-1")),
    ):
        context = bearing(BOB)
        with access.admitted(context) as handlers:
            await getattr(handlers, name)(request, context)
        assert isinstance(context.error, Forbidden), name


async def test_a_session_is_its_own_key_s_alone() -> None:
    access, _, targets = house()
    with access.admitted(bearing(ALICE)) as mine:
        await mine.CreateSession(pb.CreateSessionRequest(session_id="diary"), bearing(ALICE))
        turn = pb.ChatRequest(session_id="diary", append=True, messages=HI)
        assert [event async for event in mine.Chat(turn, bearing(ALICE))]
    assert targets.requests[0].session_id == "~alice/diary"
    with access.admitted(bearing(BOB)) as theirs:
        assert not (await theirs.ListSessions(pb.ListSessionsRequest(), bearing(BOB))).sessions
        for call in (
            lambda context: theirs.GetSession(pb.GetSessionRequest(session_id="diary"), context),
            lambda context: theirs.ForkSession(pb.ForkSessionRequest(session_id="diary"), context),
            lambda context: theirs.CloseSession(pb.CloseSessionRequest(session_id="diary"), context),
            lambda context: anext(theirs.Chat(turn, context)),
        ):
            context = bearing(BOB)
            await call(context)
            assert context.code is grpc.StatusCode.NOT_FOUND


async def test_without_keys_everybody_is_let_in() -> None:
    with InferenceAccess(gateway(), None).admitted(Context()) as handlers:
        assert (await handlers.ListModels(pb.ListModelsRequest(), Context())).models
