"""Whose turn a request is, and what becomes of its answer: the sessions of a gateway, over a store.

A store that does not answer costs a conversation its name, never its answer. Only calls about a session itself, and
turns that need its history, fail with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar
from uuid import uuid4

from paceline.api.deadline import bounded
from paceline.api.prompts import shown
from paceline.api.tool_parsing import ToolCallReader, read_whole
from paceline.errors import SessionConflict, Unavailable, UnknownSession
from paceline.sessions.history import ChatMessage, Session, SessionSummary, answered, turn_key
from paceline.sessions.store import SessionStore
from paceline.types import Delta, FinishReason, Frame, Request

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 2.0
KEPT_RESPONSES = 64
"""Of one session; each is written again with every turn. Older ones cannot be asked for."""
RECOGNIZED = "conv-"
"""Begins the names of sessions whose clients name none."""

T = TypeVar("T")

Note = Callable[[ChatMessage, Delta, int], tuple[str, str]]
"""From an answer, its last delta and the number of its tokens to an entry of `Session.responses`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request's place in a session. `messages` are all that were said before its answer, none if it is a plain
    completion; `claimed` is the key the session was recognized by; one that `appends` has the session for itself.
    A `reader` finds the calls in its answer; `tools`, `instructions` and `responses` are kept as `Session` says, with
    one more response that `noting` makes."""

    session_id: str
    messages: tuple[ChatMessage, ...] = ()
    claimed: str | None = None
    appends: bool = False
    reader: ToolCallReader | None = None
    noting: Note | None = None
    tools: str = ""
    instructions: str = ""
    responses: Mapping[str, str] = field(default_factory=dict)

    @property
    def recognizable(self) -> bool:
        """Whether the next turn may come without the session's name. Never under a name of the client's own: whoever
        says the same so far would get into its session."""
        return bool(self.messages) and self.session_id.startswith(RECOGNIZED)


class Conversations:
    """Names sessions, finds them again, keeps their histories."""

    def __init__(self, store: SessionStore, model_name: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._model = model_name
        self._clock = clock
        self._busy: set[str] = set()

    async def recognize(self, messages: Sequence[ChatMessage]) -> Turn:
        """The turn of a client that names no session: of the one that ended as these messages began, or a new one."""
        said = tuple(messages)
        if before := answered(said):
            key = turn_key(self._model, before)
            if (found := await self._claim(key)) is not None:
                return Turn(found, said, claimed=key)
        return Turn(f"{RECOGNIZED}{uuid4().hex}", said)

    async def named(self, session_id: str, messages: Sequence[ChatMessage]) -> Turn:
        """The turn of a client that names its session. If that was recognized so far, nobody else shall claim it."""
        turn = Turn(session_id, tuple(messages))
        if not turn.recognizable or not (before := answered(messages)):
            return turn
        key = turn_key(self._model, before)
        found = await self._claim(key)
        if found is not None and found != session_id:
            await self._kindly(self._store.link(key, found), "a session is not recognized")
        return replace(turn, claimed=key) if found == session_id else turn

    async def history(self, session_id: str) -> Session:
        """Raises UnknownSession."""
        found = await _bounded(self._store.get(session_id))
        if found is None:
            raise unknown_session(session_id)
        return found

    async def summary(self, session_id: str) -> SessionSummary | None:
        return await _bounded(self._store.summary(session_id))

    async def summaries(self) -> list[SessionSummary]:
        """Of the sessions used last; none if the store does not answer."""
        return await self._kindly(self._store.summaries(), "stored sessions are not listed") or []

    async def create(self, session_id: str | None, messages: Sequence[ChatMessage], seed: int | None) -> Session:
        """A session without a turn. Raises SessionConflict if there is one of that name."""
        now = self._clock()
        return await self._add(
            Session(session_id or _new_name(), messages=tuple(messages), seed=seed, created=now, updated=now)
        )

    async def fork(self, session_id: str, fork_id: str | None) -> Session:
        """A second session with the same history; both go on by themselves. Raises as `history` and `create` do."""
        source, now = await self.history(session_id), self._clock()
        name = fork_id or _new_name()
        return await self._add(replace(source, session_id=name, parent=session_id, created=now, updated=now))

    async def put(self, session: Session) -> None:
        """Keep a session in place of what was stored of it."""
        await _bounded(self._store.put(session))

    def busy(self, session_id: str) -> bool:
        """Whether a turn is being appended to it from here."""
        return session_id in self._busy

    async def delete(self, session_id: str) -> bool:
        return await _bounded(self._store.delete(session_id))

    async def recorded(
        self, frames: AsyncGenerator[Frame, None], request: Request, turn: Turn
    ) -> AsyncGenerator[Frame, None]:
        """The frames, unchanged. Before the client has the last one of output 0, the session has the answer.

        An answer that is not complete changes nothing: the turn can be asked again. Raises SessionConflict if it
        would append beside another turn that does.
        """
        if turn.appends and turn.session_id in self._busy:
            raise SessionConflict(f"session_id: {shown(turn.session_id)} has a turn under way", param="session_id")
        if turn.appends:
            self._busy.add(turn.session_id)
        output: list[int] = []
        text = ""
        kept = False
        try:
            async with aclosing(frames):
                async for frame in frames:
                    if isinstance(frame, Delta) and frame.index == 0:
                        output += frame.token_ids
                        text += frame.text
                        if frame.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                            kept = True
                            await self._kindly(self._keep(request, turn, output, text, frame), "a turn is not kept")
                    yield frame
        finally:
            if turn.appends:
                self._busy.discard(turn.session_id)
            if turn.claimed is not None and not kept:
                await self._kindly(self._store.link(turn.claimed, turn.session_id), "a session is lost")

    async def close(self) -> None:
        await self._store.close()

    async def _keep(self, request: Request, turn: Turn, output: Sequence[int], text: str, last: Delta) -> None:
        before, now = await self._store.summary(turn.session_id), self._clock()
        before = before or SessionSummary(turn.session_id, created=now)
        answer = _answer(turn, text)
        messages = (*turn.messages, answer) if turn.messages else ()
        noted = [turn.noting(answer, last, len(output))] if turn.noting is not None else []
        await self._store.put(
            Session(
                turn.session_id,
                (*request.token_ids, *output),
                messages,
                turns=before.turns + 1,
                seed=before.seed,
                parent=before.parent,
                created=before.created,
                updated=now,
                tools=turn.tools,
                instructions=turn.instructions,
                responses=dict([*turn.responses.items(), *noted][-KEPT_RESPONSES:]),
            )
        )
        if turn.recognizable:
            await self._store.link(turn_key(self._model, messages), turn.session_id)

    async def _claim(self, key: str) -> str | None:
        return await self._kindly(self._store.claim(key), "a session is not recognized")

    async def _add(self, session: Session) -> Session:
        if not await _bounded(self._store.add(session)):
            raise SessionConflict(f"session_id: {shown(session.session_id)} exists already", param="session_id")
        return session

    async def _kindly(self, answer: Awaitable[T], otherwise: str) -> T | None:
        """What the store says, or None and a line in the log."""
        try:
            return await _bounded(answer)
        except Unavailable as error:
            logger.warning("%s: %s", otherwise, error.message)
            return None


def _answer(turn: Turn, text: str) -> ChatMessage:
    """As clients send it back: with calls for calls."""
    content, calls = (text, ()) if turn.reader is None else read_whole(turn.reader, text)
    return ChatMessage("assistant", content, tool_calls=calls)


async def _bounded(answer: Awaitable[T]) -> T:
    late = Unavailable(f"the session store did not answer within {STORE_TIMEOUT_S:g} s")
    return await bounded(answer, asyncio.timeout(STORE_TIMEOUT_S), late)


def unknown_session(session_id: str) -> UnknownSession:
    return UnknownSession(f"session_id: nobody holds a session {shown(session_id)}", param="session_id")


def _new_name() -> str:
    return f"sess-{uuid4().hex}"
