"""The calls with one answer: what is sent, and how the answer is read. Both clients make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from paceline.client.answers import Model, Relief, SessionInfo, models_of, relief_of, session_info
from paceline.client.options import Message, messages_of
from paceline.v1 import inference_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """`harmless`: nothing changes if it is made twice."""

    method: str
    request: Any
    read: Callable[[Any], T]
    harmless: bool = True


def tokenize(content: str | Sequence[Message], model: str) -> Call[tuple[int, ...]]:
    given: dict[str, Any] = (
        {"text": content} if isinstance(content, str) else {"messages": pb.Messages(messages=messages_of(content))}
    )
    return Call("Tokenize", pb.TokenizeRequest(model=model, **given), lambda answer: tuple(answer.token_ids))


def detokenize(token_ids: Sequence[int], model: str) -> Call[str]:
    return Call("Detokenize", pb.DetokenizeRequest(model=model, token_ids=token_ids), lambda answer: str(answer.text))


def models() -> Call[tuple[Model, ...]]:
    return Call("ListModels", pb.ListModelsRequest(), models_of)


def status() -> Call[pb.StatusResponse]:
    return Call("Status", pb.StatusRequest(), lambda answer: answer)


def abort(request_id: str) -> Call[bool]:
    return Call("Abort", pb.AbortRequest(request_id=request_id), lambda answer: bool(answer.aborted))


def create_session(
    session_id: str | None, messages: Message | Sequence[Message], seed: int | None
) -> Call[SessionInfo]:
    request = pb.CreateSessionRequest(session_id=session_id or "", messages=messages_of(messages), seed=seed)
    # Of one that has a name the second attempt hears that it exists.
    return Call("CreateSession", request, session_info, harmless=session_id is not None)


def fork_session(session_id: str, fork_id: str | None) -> Call[SessionInfo]:
    request = pb.ForkSessionRequest(session_id=session_id, fork_id=fork_id or "")
    return Call("ForkSession", request, session_info, harmless=False)


def list_sessions() -> Call[tuple[SessionInfo, ...]]:
    return Call("ListSessions", pb.ListSessionsRequest(), lambda answer: tuple(map(session_info, answer.sessions)))


def get_session(session_id: str) -> Call[SessionInfo]:
    return Call("GetSession", pb.GetSessionRequest(session_id=session_id), session_info)


def close_session(session_id: str) -> Call[None]:
    request = pb.CloseSessionRequest(session_id=session_id)
    return Call("CloseSession", request, lambda _: None, harmless=False)


def move_session(session_id: str, replica_id: str | None) -> Call[SessionInfo]:
    request = pb.MoveSessionRequest(session_id=session_id, replica_id=replica_id or "")
    return Call("MoveSession", request, session_info, harmless=False)


def relieve(replica_id: str, sessions: int) -> Call[Relief]:
    request = pb.RelieveRequest(replica_id=replica_id, sessions=sessions)
    return Call("Relieve", request, relief_of, harmless=False)


def drain(replica_id: str, wait_s: float | None) -> Call[Relief]:
    return Call("Drain", pb.DrainRequest(replica_id=replica_id, timeout_seconds=wait_s), relief_of)
