"""What a server says, as plain frozen data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.errors import Unavailable
from paceline.seeds import choice_seed
from paceline.sessions.history import ChatMessage, ToolCall
from paceline.types import CompletionOutput, Delta, FinishReason, Metrics, SourceMetrics, TokenLogprobs, Verified
from paceline.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Started:
    """A replica took the request. `seed` draws the same answer again; `route` says why it went there."""

    request_id: str
    session_id: str
    replica_id: str
    seed: int
    prompt_tokens: int
    route: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer: `outputs`, of which there are n, and the first of them by its own names.

    `tool_calls` are those of output 0. `prompt_logprobs`, if asked for, has an entry for each prompt token but the
    first.
    """

    started: Started
    outputs: tuple[CompletionOutput, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def message(self) -> ChatMessage:
        """The answer as a message of the conversation that goes on."""
        return ChatMessage("assistant", self.text, tool_calls=self.tool_calls)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def metrics(self) -> Metrics:
        return self.outputs[0].metrics

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def request_id(self) -> str:
        return self.started.request_id

    @property
    def session_id(self) -> str:
        return self.started.session_id

    @property
    def replica_id(self) -> str:
        return self.started.replica_id

    @property
    def seed(self) -> int:
        return self.started.seed


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served, and its longest prompt plus output in tokens."""

    name: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Where a session's KV cache lies and what is stored of its history; None where there is nothing.

    `kv_tier` is device, host or disk; times are seconds since 1970.
    """

    session_id: str
    replica_id: str | None
    cached_tokens: int
    running: bool
    kv_bytes: int | None
    kv_tier: str | None
    history_tokens: int | None
    turns: int | None
    parent: str | None
    created: float | None
    updated: float | None


@dataclass(frozen=True, slots=True)
class Relief:
    """Sessions that a replica handed over, with who holds each now, and those that stay, with why."""

    moved: Mapping[str, str]
    stay: Mapping[str, str]


@dataclass(slots=True)
class _Output:
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    calls: dict[int, ToolCall] = field(default_factory=dict)
    reason: FinishReason | None = None
    metrics: Metrics = field(default_factory=Metrics)


class Collected:
    """The events of one request, put together. `n` outputs end it."""

    def __init__(self, n: int = 1) -> None:
        self.started: Started | None = None
        self.began = False
        """Whether a part of the answer is there: from then on nothing may begin anew."""
        self._outputs = [_Output() for _ in range(n)]
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def add(self, event: pb.GenerateEvent) -> Delta | None:
        """What the event adds to the answer, if anything."""
        match event.WhichOneof("event"):
            case "started":
                self.started = _started(event.started)
            case "tokens":
                self.began = True
                return self._tokens(event.tokens)
            case "tool_call":
                self.began = True
                self._tool_call(event.tool_call)
            case "finished":
                self.began = True
                return self._finished(event.finished)
        return None

    def answer(self) -> Answer:
        """Raises Unavailable if the events ended before the answer did."""
        if self.started is None or any(output.reason is None for output in self._outputs):
            raise Unavailable("the server ended the answer before it was complete; try again")
        calls = self._outputs[0].calls
        outputs = tuple(self._output(index, output) for index, output in enumerate(self._outputs))
        return Answer(self.started, outputs, tuple(calls[n] for n in sorted(calls)), self._prompt_logprobs)

    def _output(self, index: int, output: _Output) -> CompletionOutput:
        assert self.started is not None and output.reason is not None
        seed = choice_seed(self.started.seed, index) if index else self.started.seed
        logprobs = tuple(output.logprobs) if output.logprobs else None
        ids, text = tuple(output.token_ids), "".join(output.text)
        return CompletionOutput(index, ids, text, output.reason, seed, output.metrics, logprobs)

    def _tokens(self, tokens: pb.Tokens) -> Delta:
        output = self._outputs[tokens.index]
        delta = Delta(
            tuple(tokens.token_ids),
            tokens.text,
            index=tokens.index,
            logprobs=_logprobs(tokens.logprobs),
            prompt_logprobs=_logprobs(tokens.prompt_logprobs),
            verified=_verified(tokens),
        )
        output.token_ids += delta.token_ids
        output.text.append(delta.text)
        output.logprobs += delta.logprobs
        self._prompt_logprobs += delta.prompt_logprobs
        return delta

    def _tool_call(self, piece: pb.ToolCallDelta) -> None:
        calls = self._outputs[piece.index].calls
        before = calls.get(piece.call, ToolCall("", "", ""))
        calls[piece.call] = ToolCall(
            before.call_id or piece.id, before.name or piece.name, before.arguments + piece.arguments
        )

    def _finished(self, finished: pb.Finished) -> Delta:
        output = self._outputs[finished.index]
        output.reason, output.metrics = _reason(finished.reason), metrics_of(finished.usage)
        return Delta((), "", output.reason, output.metrics, finished.index)


def metrics_of(usage: pb.Usage) -> Metrics:
    """What a request cost, as the server counted it."""
    return Metrics(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted=usage.drafted_tokens,
        accepted=usage.accepted_tokens,
        late=usage.late_drafts,
        steps=usage.steps,
        queue_s=usage.queue_seconds,
        ttft_s=usage.ttft_seconds,
        total_s=usage.total_seconds,
        wasted=usage.wasted_drafts,
        sources=tuple(
            SourceMetrics(each.source, tuple(each.drafted), tuple(each.accepted), each.wasted) for each in usage.sources
        ),
        resumptions=usage.resumptions,
    )


def session_info(session: pb.Session) -> SessionInfo:
    """An unset field is None."""
    optional = ("kv_bytes", "kv_tier", "history_tokens", "turns", "parent", "created", "updated")
    told = {name: getattr(session, name) if session.HasField(name) else None for name in optional}
    return SessionInfo(session.session_id, session.replica_id or None, session.cached_tokens, session.running, **told)


def models_of(listed: pb.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(Model(model.name, model.max_model_len) for model in listed.models)


def relief_of(answer: pb.RelieveResponse | pb.DrainResponse) -> Relief:
    return Relief(dict(answer.moved), dict(answer.stay))


def _started(started: pb.Started) -> Started:
    return Started(
        started.request_id,
        started.session_id,
        started.replica_id,
        started.seed,
        started.prompt_tokens,
        started.route,
    )


def _reason(reason: int) -> FinishReason:
    """Functions that are called end an answer as anything does: `tool_calls` tells. So does a newer server's word."""
    try:
        return FinishReason[pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_")]
    except (KeyError, ValueError):
        return FinishReason.STOP


def _verified(tokens: pb.Tokens) -> Verified | None:
    if not tokens.HasField("verified"):
        return None
    told = tokens.verified
    return Verified(told.source, told.drafted, told.accepted, told.chars)


def _logprobs(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(each.token_id, each.logprob, each.rank, _top(each.top)) for each in entries)


def _top(top: Sequence[pb.TopLogprob]) -> tuple[tuple[int, float], ...]:
    return tuple((each.token_id, each.logprob) for each in top)
