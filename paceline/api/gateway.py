"""The front end without a transport: HTTP and gRPC both turn their requests into calls of `Gateway`."""

from __future__ import annotations

import asyncio
import copy
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar
from uuid import uuid4

from paceline.api.conversations import Conversations, Turn, unknown_session
from paceline.api.deadline import bounded
from paceline.api.fitting import Fitting, GrammarCheck
from paceline.api.logprobs import TokenTexts
from paceline.api.nodes import NodeControl, Nodes, NoNodes
from paceline.api.observed import Observer
from paceline.api.prompts import (
    ChatMessage,
    PromptEncoder,
    Tokenizer,
    check_messages,
    check_session_id,
    check_tools,
    check_unicode,
    instructed,
    shown,
)
from paceline.api.resume import RouterCounts, resuming
from paceline.api.state import ClusterStatus, SessionInfo, with_histories
from paceline.api.stream import Stream
from paceline.api.tally import Readers
from paceline.api.tool_forms import ParserName
from paceline.api.tools import Tool, ToolUse, offered_json, tools_from_json
from paceline.config import LimitSettings, SchedulingPolicy
from paceline.errors import InvalidRequest, PacelineError, RequestTimeout, SessionConflict, Unavailable, UnknownModel
from paceline.sessions.handoff import BUSY, Outcome
from paceline.sessions.history import Session
from paceline.sessions.rules import WindowRules
from paceline.sessions.store import MemoryStore, SessionStore
from paceline.telemetry.requests import NOWHERE, Origin
from paceline.types import Frame, Prompt, Request, SamplingParams

CONTROL_TIMEOUT_S = 10.0
"""How long a question about sessions or status may take."""
DRAIN_TIMEOUT_S = 30.0
DRAIN_POLL_S = 0.1
SESSION_TTL_S = 3600.0
CHARS_PER_TOKEN = 64
"""More than texts have, but for pages of spaces: a longer prompt cannot fit, and is not worth tokenizing."""

T = TypeVar("T")

NO_TOOLS = ToolUse()


class Targets(Protocol):
    """The seam to the target replicas."""

    @abstractmethod
    def generate(self, request: Request) -> AsyncIterator[Frame]:
        """An async generator of the frames of one request. Cancelling or closing it cancels the work."""

    @abstractmethod
    async def sessions(self) -> list[SessionInfo]:
        """Every session whose KV cache a replica holds."""

    @abstractmethod
    async def close_session(self, session_id: str) -> bool:
        """Drop a session's KV cache; False if nobody holds it."""

    @abstractmethod
    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        """Have a replica hand the KV of these sessions, or of those used last, at most `count`, to others, or to one.
        None if there is no such replica."""

    @abstractmethod
    async def abort(self, request_id: str) -> bool:
        """End a request, whoever opened it, with FinishReason.ABORT; False if no replica computes it."""

    @abstractmethod
    async def status(self) -> ClusterStatus:
        """What the replicas report about themselves."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be opened, and the turn of a session that it is, if any."""

    request: Request
    turn: Turn | None = None
    tools: ToolUse = NO_TOOLS
    timeout_s: float | None = None
    """The client's own limit; the server's holds in any case."""
    origin: Origin = NOWHERE


class Gateway:
    """Checks, tokenizes and names requests, and opens their streams."""

    def __init__(
        self,
        targets: Targets,
        tokenizer: Tokenizer,
        model_name: str,
        max_model_len: int,
        request_timeout_s: float,
        scheduling_policy: SchedulingPolicy = "fcfs",
        synthetic_acceptance: float | None = None,
        windows: WindowRules | None = None,
        *,
        max_resumptions: int = 0,
        store: SessionStore | None = None,
        tool_call_parser: ParserName | Literal["auto"] = "auto",
        check_grammar: GrammarCheck | None = None,
        limits: LimitSettings | None = None,
        router: str = "",
        observer: Observer | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.synthetic_acceptance = synthetic_acceptance
        """Set if the targets accept candidates by chance (`SpeculationSettings.synthetic_acceptance`)."""
        self.model_name = model_name
        self.max_model_len = max_model_len
        self.created = int(time.time())
        self.token_texts = TokenTexts(tokenizer)
        self._targets = targets
        self._nodes: Nodes = nodes or NoNodes()
        limits = limits or LimitSettings()
        chars = CHARS_PER_TOKEN * max_model_len if limits.max_prompt_chars == "auto" else limits.max_prompt_chars
        self._prompts = PromptEncoder(tokenizer, tool_call_parser, chars, limits.max_messages)
        self._fitting = Fitting(self._prompts, windows or WindowRules(max_model_len), scheduling_policy, check_grammar)
        self._request_timeout_s = request_timeout_s
        self._max_resumptions = max_resumptions
        self._seen, self._router = RouterCounts(), router
        self._observer = observer
        self._store = store or MemoryStore(SESSION_TTL_S)
        self._conversations = Conversations(self._store, model_name)
        self._scopes = {"": self._conversations}

    def scoped(
        self,
        owner: str,
        targets: Callable[[Targets], Targets],
        store: Callable[[SessionStore], SessionStore],
        nodes: Callable[[Nodes], Nodes],
    ) -> Gateway:
        """This front end before what belongs to one owner: its share of the replicas and of the stored sessions."""
        if owner not in self._scopes:
            self._scopes[owner] = Conversations(store(self._store), self.model_name)
        scope = copy.copy(self)
        scope._targets = targets(self._targets)
        scope._nodes = nodes(self._nodes)
        scope._conversations = self._scopes[owner]
        return scope

    @property
    def conversations(self) -> Conversations:
        """The stored sessions."""
        return self._conversations

    async def prepare_chat(
        self,
        messages: Sequence[ChatMessage],
        params: SamplingParams,
        *,
        model: str | None = None,
        session_id: str | None = None,
        speculate: bool = True,
        priority: int = 0,
        tools: ToolUse = NO_TOOLS,
    ) -> Prepared:
        """One turn of a conversation, all of whose messages are given. Raises InvalidRequest naming the field."""
        self.check_model(model)
        self._fitting.check_priority(priority)
        known = check_messages(messages)
        if session_id is not None:
            check_session_id(session_id)
        check_tools(tools.offered)
        token_ids = await self._prompts.chat(known, tools.offered)
        fitted = self._fitting.fit("messages", len(token_ids), await self._fitting.constrained(params, tools))
        names = self._conversations
        turn = await (names.recognize(known) if session_id is None else names.named(session_id, known))
        request = self._chat_request(token_ids, fitted, turn.session_id, speculate, priority)
        return self._calling(request, turn, tools)

    async def prepare_turn(
        self,
        session_id: str,
        messages: Sequence[ChatMessage],
        params: SamplingParams,
        *,
        model: str | None = None,
        speculate: bool = True,
        priority: int = 0,
        tools: ToolUse | None = None,
    ) -> Prepared:
        """The next turn of a stored session: `messages` are only what is new. Without a seed it has the session's, and
        with None for `tools` those of its last turn.

        Raises UnknownSession, and InvalidRequest naming the field.
        """
        session = await self._conversations.history(check_session_id(session_id))
        if session.token_ids and not session.messages:
            raise InvalidRequest(
                "session_id: a session of plain completions has no messages to go on from", param="session_id"
            )
        return await self.prepare_from(
            session,
            messages,
            params,
            tools=ToolUse(tools_from_json(session.tools)) if tools is None else tools,
            instructions=session.instructions,
            model=model,
            speculate=speculate,
            priority=priority,
        )

    async def prepare_from(
        self,
        session: Session,
        messages: Sequence[ChatMessage],
        params: SamplingParams,
        *,
        tools: ToolUse,
        instructions: str = "",
        source: str = "messages",
        model: str | None = None,
        speculate: bool = True,
        priority: int = 0,
    ) -> Prepared:
        """The next turn of a session, stored or about to be; `source` is the field that new messages come from.

        Raises InvalidRequest naming the field.
        """
        self.check_model(model)
        self._fitting.check_priority(priority)
        known = check_messages(messages, source)
        check_tools(tools.offered)
        check_unicode("instructions", instructions)
        # Instructions and functions stand at the beginning: with others, all of it is rendered anew.
        same = (offered_json(tools), instructions) == (session.tools, session.instructions)
        said, new = (list(session.messages), known) if session.messages else (known, [])
        token_ids = await self._prompts.turn(
            session.token_ids if same else (), instructed(instructions, said), new, tools.offered
        )
        if params.seed is None:
            params = replace(params, seed=session.seed)
        fitted = self._fitting.fit(source, len(token_ids), await self._fitting.constrained(params, tools))
        turn = Turn(
            session.session_id,
            (*session.messages, *known),
            appends=True,
            instructions=instructions,
            responses=session.responses,
        )
        request = self._chat_request(token_ids, fitted, session.session_id, speculate, priority)
        return self._calling(request, turn, tools)

    async def prepare_completion(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        model: str | None = None,
        session_id: str | None = None,
        speculate: bool = True,
        priority: int = 0,
        default_max_tokens: int | None = None,
    ) -> Prepared:
        """A plain prompt as a request; without a session unless the client names one.

        `default_max_tokens` stands in for `params.max_tokens` None, and shrinks to what the context leaves.
        """
        self.check_model(model)
        self._fitting.check_priority(priority)
        session = None if session_id is None else check_session_id(session_id)
        token_ids = await self._prompts.prompt(prompt)
        params = await self._fitting.constrained(params, NO_TOOLS)
        if params.max_tokens is None and default_max_tokens is not None:
            params = replace(params, max_tokens=self._fitting.at_most(default_max_tokens, len(token_ids), params))
        fitted = self._fitting.fit("prompt", len(token_ids), params)
        request = Request(f"cmpl-{uuid4().hex}", token_ids, fitted, session, speculate, priority=priority)
        return Prepared(request, None if session is None else Turn(session))

    async def open(self, prepared: Prepared) -> Stream:
        """Start a request. Raises its error if no replica takes it; otherwise the caller closes the stream."""
        request, turn = prepared.request, prepared.turn
        own = self._request_timeout_s
        timeout_s = own if prepared.timeout_s is None else min(own, prepared.timeout_s)
        watched = None if self._observer is None else self._observer.begin(request, prepared.origin, timeout_s)
        request = request if watched is None else watched.request
        frames = resuming(self._targets.generate, request, self._max_resumptions, seen=self._seen)
        if turn is not None:
            frames = self._conversations.recorded(frames, request, turn)
        if watched is not None:
            frames = watched.frames(frames)
        return await Stream.open(frames, timeout_s, request.params.n)

    async def abort(self, request_id: str) -> bool:
        """End a request, whichever router opened it; False if no replica computes it, or no longer."""
        return await _bounded(self._targets.abort(request_id))

    def readers(self, tools: ToolUse) -> Readers | None:
        """What finds the calls in the answers to a request, if there are functions to call."""
        if not tools.callable:
            return None
        return lambda request, index: self._prompts.tools.reader(tools, f"{request.request_id}/{index}")

    def text_of(self, prompt: Prompt) -> str:
        """A prompt as text."""
        return prompt if isinstance(prompt, str) else self._prompts.text_of(prompt)

    async def tokenize(
        self,
        content: str | Sequence[ChatMessage],
        *,
        model: str | None = None,
        tools: Sequence[Tool] = (),
        special: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a text, with the `special` ones the tokenizer adds, or of a conversation as `prepare_chat`
        renders it."""
        self.check_model(model)
        if isinstance(content, str):
            return await self._prompts.text("prompt", content, special=special)
        check_tools(tools)
        return await self._prompts.chat(check_messages(content), tools)

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, param: str = "token_ids") -> str:
        """The text of token ids, special tokens included. Raises InvalidRequest that names `param`."""
        self.check_model(model)
        return await self._prompts.detokenize(param, token_ids)

    async def create_session(
        self, session_id: str | None = None, messages: Sequence[ChatMessage] = (), seed: int | None = None
    ) -> SessionInfo:
        """A session that begins with these messages. Raises SessionConflict if it exists."""
        known = check_messages(messages) if messages else []
        SamplingParams(seed=seed)  # for its check
        name = None if session_id is None else check_session_id(session_id)
        created = await self._conversations.create(name, known, seed)
        return SessionInfo(created.session_id, None, 0, False).with_history(created.summary)

    async def fork_session(self, session_id: str, fork_id: str | None = None) -> SessionInfo:
        """Another session with the history of this one. Raises UnknownSession, SessionConflict if it exists."""
        name = None if fork_id is None else check_session_id(fork_id)
        fork = await self._conversations.fork(session_id, name)
        return SessionInfo(fork.session_id, None, 0, False).with_history(fork.summary)

    async def sessions(self) -> list[SessionInfo]:
        """Every session whose KV cache a replica holds, and the latest of those of which only the history is kept."""
        held, stored = await asyncio.gather(_bounded(self._targets.sessions()), self._conversations.summaries())
        return with_histories(held, stored)

    async def session(self, session_id: str) -> SessionInfo:
        """One of them. Raises UnknownSession."""
        held, stored = await asyncio.gather(_bounded(self._targets.sessions()), self._conversations.summary(session_id))
        mine = [info for info in held if info.session_id == session_id]
        found = with_histories(mine, [] if stored is None else [stored])
        if not found:
            raise unknown_session(session_id)
        return found[0]

    async def messages(self, session_id: str) -> tuple[ChatMessage, ...]:
        """What was said in a session, as far as it is stored. Raises UnknownSession."""
        return (await self._conversations.history(session_id)).messages

    async def close_session(self, session_id: str) -> None:
        """Drop a session's KV cache and its history. Raises UnknownSession if there is neither."""
        dropped, deleted = await asyncio.gather(
            _bounded(self._targets.close_session(session_id)), self._conversations.delete(session_id)
        )
        if not (dropped or deleted):
            raise unknown_session(session_id)

    async def move_session(self, session_id: str, to: str | None = None) -> SessionInfo:
        """Hand a session's KV to another replica, or to a certain one. Raises UnknownSession if no replica holds any,
        SessionConflict if a turn is under way, Unavailable if no replica can take it."""
        held = [info for info in await _bounded(self._targets.sessions()) if info.session_id == session_id]
        if not held:
            raise unknown_session(session_id)
        holder = max(held, key=lambda info: info.cached_tokens).replica_id
        assert holder is not None
        outcome = None if to == holder else await _bounded(self._targets.hand_off(holder, [session_id], 1, to))
        if outcome is not None and session_id in outcome.left:
            raise _stays(session_id, outcome.left[session_id])
        return await self.session(session_id)

    async def relieve(self, replica: str, count: int) -> Outcome:
        """Hand the KV of idle sessions of a replica, those used last, to others. Raises InvalidRequest if there is no
        such replica."""
        outcome = await _bounded(self._targets.hand_off(replica, None, count))
        return _of_known(replica, outcome)

    async def drain(self, replica: str, timeout_s: float = DRAIN_TIMEOUT_S) -> Outcome:
        """Hand the KV of all sessions of a replica to others, of those being answered once their turn is over, or give
        up on them when the time is. Raises InvalidRequest if there is no such replica."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        drained, refused = Outcome(), dict[str, str]()
        while True:
            held = [info.session_id for info in await _bounded(self._targets.sessions()) if info.replica_id == replica]
            wanted = [name for name in held if name not in refused]
            outcome = _of_known(replica, await _bounded(self._targets.hand_off(replica, wanted, len(wanted))))
            drained.arrived |= outcome.arrived
            refused |= {name: why for name, why in outcome.left.items() if why != BUSY}
            busy = {name: why for name, why in outcome.left.items() if why == BUSY}
            if not busy or asyncio.get_running_loop().time() >= deadline:
                drained.left = refused | busy
                return drained
            await asyncio.sleep(DRAIN_POLL_S)

    async def node_control(self) -> NodeControl:
        """The nodes, with what sessions are held now."""
        return NodeControl(self._nodes, await _bounded(self._targets.sessions()))

    async def close(self) -> None:
        """Release the session store."""
        await self._conversations.close()

    async def status(self) -> ClusterStatus:
        """What the replicas report about themselves, and what this router has seen."""
        return self.with_own_counts(await _bounded(self._targets.status()))

    def with_own_counts(self, cluster: ClusterStatus) -> ClusterStatus:
        """With what this router has seen."""
        seen = self._seen
        return replace(cluster, routes=dict(seen.routes), resumptions=seen.resumptions, router=self._router)

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` is the model served. None and "" stand for it."""
        if name and name != self.model_name:
            raise UnknownModel(f"model: no model {shown(name)} here; {self.model_name!r} is served", param="model")

    def _chat_request(
        self,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        session_id: str | None,
        speculate: bool,
        priority: int,
    ) -> Request:
        name = f"chatcmpl-{uuid4().hex}"
        return Request(name, token_ids, params, session_id, speculate, priority=priority)

    def _calling(self, request: Request, turn: Turn, tools: ToolUse) -> Prepared:
        """With what the session keeps of the functions, and of the answer's calls."""
        readers = self.readers(tools)
        kept = replace(turn, tools=offered_json(tools), reader=readers and readers(request, 0))
        return Prepared(request, kept, tools)


def _stays(session_id: str, why: str) -> PacelineError:
    kind = SessionConflict if why == BUSY else Unavailable
    return kind(f"session_id: {shown(session_id)} stays where it is: {why}", param="session_id")


def _of_known(replica: str, outcome: Outcome | None) -> Outcome:
    """What a replica handed over. Raises InvalidRequest if there was none to ask."""
    if outcome is None:
        raise InvalidRequest(f"replica: no target replica {shown(replica)} here", param="replica")
    return outcome


async def _bounded(answer: Awaitable[T]) -> T:
    late = RequestTimeout(f"the replicas did not answer within {CONTROL_TIMEOUT_S:g} s")
    return await bounded(answer, asyncio.timeout(CONTROL_TIMEOUT_S), late)
