"""/v1/responses over sessions: each response is a turn of a stored conversation, and can be gone on from.

    resp_<session: 32 hex digits><its own: 8>   leads any router that shares the store to session resp-<session>
    session.responses[id]                       how many messages there were with its answer, and the response as sent

A response that is not the last of its session is gone on from in a session of its own, which begins with the same
messages: so is one whose session is busy.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from paceline.api.answers_responses import ResponseObject
from paceline.api.gateway import Gateway, Prepared
from paceline.api.prompts import shown
from paceline.api.schema_responses import ResponsesRequest
from paceline.api.wording_responses import ResponseWording
from paceline.errors import UnknownSession
from paceline.sessions.history import ChatMessage, Session
from paceline.types import Delta

SESSION = "resp-"
"""Begins the names of sessions of responses."""

_ID = re.compile(r"resp_([0-9a-f]{32})[0-9a-f]{8}")


@dataclass(frozen=True)
class Responses:
    """The responses of a gateway."""

    gateway: Gateway

    async def prepare(self, body: ResponsesRequest) -> tuple[Prepared, ResponseWording]:
        """Raises UnknownSession for a previous response that is not stored, and InvalidRequest naming the field."""
        body.check()
        session = await self._before(body.previous_response_id)
        prepared = await self.gateway.prepare_from(
            session,
            body.messages(),
            body.params(),
            tools=body.tool_use(),
            instructions=body.instructions or "",
            source="input",
            model=body.model,
            speculate=body.speculation is not False,
            priority=body.priority or 0,
        )
        wording = self._wording(body, prepared, f"resp_{session.session_id.removeprefix(SESSION)}{uuid4().hex[:8]}")
        assert prepared.turn is not None
        if body.store is False:
            return replace(prepared, request=replace(prepared.request, session_id=None), turn=None), wording
        return replace(prepared, turn=replace(prepared.turn, noting=_noting(wording, prepared))), wording

    async def get(self, response_id: str) -> bytes:
        """The response as JSON. Raises UnknownSession."""
        session = await self._session(response_id, "response_id")
        return json.dumps(json.loads(session.responses[response_id])["response"]).encode()

    async def delete(self, response_id: str) -> None:
        """Forget it; with its last response goes the session. Raises UnknownSession."""
        session = await self._session(response_id, "response_id")
        left = {name: kept for name, kept in session.responses.items() if name != response_id}
        if left:
            await self.gateway.conversations.put(replace(session, responses=left))
        else:
            await self.gateway.close_session(session.session_id)

    async def _before(self, response_id: str | None) -> Session:
        """The session that the next response goes on with."""
        if response_id is None:
            return Session(_new_name())
        session = await self._session(response_id, "previous_response_id")
        said = json.loads(session.responses[response_id])["messages"]
        if said == len(session.messages) and not self.gateway.conversations.busy(session.session_id):
            return session
        return Session(_new_name(), messages=session.messages[:said], parent=session.session_id)

    async def _session(self, response_id: str, param: str) -> Session:
        """Whose response that is."""
        unknown = UnknownSession(f"{param}: no response {shown(response_id)} is stored here", param=param)
        found = _ID.fullmatch(response_id)
        if found is None:
            raise unknown
        try:
            session = await self.gateway.conversations.history(f"{SESSION}{found[1]}")
        except UnknownSession:
            raise unknown from None
        if response_id not in session.responses:
            raise unknown
        return session

    def _wording(self, body: ResponsesRequest, prepared: Prepared, response_id: str) -> ResponseWording:
        gateway, now = self.gateway, int(time.time())
        params = prepared.request.params
        begun = ResponseObject(
            id=response_id,
            created_at=now,
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=gateway.model_name,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            store=body.store is not False,
            temperature=params.temperature,
            text=_as_sent(body.text) or {"format": {"type": "text"}},
            tool_choice=_as_sent(body.tool_choice) or "auto",
            tools=[_as_sent(tool) for tool in body.tools or ()],
            top_p=params.top_p,
            top_logprobs=params.logprobs or 0,
            metadata=body.metadata or {},
        )
        return ResponseWording(
            response_id,
            gateway.model_name,
            now,
            gateway.token_texts,
            synthetic_acceptance=gateway.synthetic_acceptance,
            readers=gateway.readers(prepared.tools),
            begun=begun,
        )


def _noting(wording: ResponseWording, prepared: Prepared) -> Any:
    """What a session keeps of a response."""
    assert prepared.turn is not None
    said, prompt_tokens = len(prepared.turn.messages) + 1, len(prepared.request.token_ids)

    def note(answer: ChatMessage, last: Delta, output_tokens: int) -> tuple[str, str]:
        stored = wording.stored(answer, last, output_tokens, prompt_tokens)
        return wording.id, json.dumps({"messages": said, "response": json.loads(stored)})

    return note


def _as_sent(part: Any) -> Any:
    """A part of the request, as the client sent it."""
    return part.model_dump(by_alias=True, exclude_none=True) if hasattr(part, "model_dump") else part


def _new_name() -> str:
    return f"{SESSION}{uuid4().hex}"
