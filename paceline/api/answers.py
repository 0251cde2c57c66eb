"""What clients get: OpenAI's responses and chunks, each with a `paceline` object that says how it was made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import CoreSchema

from paceline.sessions.history import ChatMessage
from paceline.types import Delta, Metrics, SourceMetrics


class Answer(BaseModel):
    """Base of everything sent. Fields that are None are left out of the JSON."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    def json_bytes(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()


class SourceInfo(Answer):
    """What one source of candidates contributed; the lists count by place in a run of candidates."""

    drafted: list[int]
    accepted: list[int]
    wasted: int = 0

    @classmethod
    def of(cls, source: SourceMetrics) -> SourceInfo:
        return cls(drafted=list(source.drafted), accepted=list(source.accepted), wasted=source.wasted)


class VerifiedInfo(Answer):
    """What became of the candidates of one step: `text` is the part of the chunk's that was guessed, its beginning."""

    source: str
    drafted: int
    accepted: int
    text: str

    @classmethod
    def of(cls, delta: Delta) -> VerifiedInfo | None:
        found = delta.verified
        if found is None:
            return None
        text = delta.text[: found.chars]
        return cls(source=found.source, drafted=found.drafted, accepted=found.accepted, text=text)


class PacelineInfo(Answer):
    """Who made the answer and what it cost. A chunk that is not the last has `token_ids` and `verified` alone.

    Of an answer with several choices the numbers are sums, and `seeds` and `choice_token_ids` have an entry for each.
    `resumptions`, if any, counts the replicas that were lost on the way; `replica_id` is the first.
    `synthetic_acceptance` marks an answer whose text is nonsense, made for a benchmark.
    """

    replica_id: str | None = None
    session_id: str | None = None
    seed: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    late_drafts: int | None = None
    wasted_drafts: int | None = None
    sources: dict[str, SourceInfo] | None = None
    synthetic_acceptance: float | None = None
    steps: int | None = None
    cached_tokens: int | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    resumptions: int | None = None
    token_ids: list[int] | None = None
    verified: VerifiedInfo | None = None
    seeds: list[int] | None = None
    choice_token_ids: list[list[int]] | None = None


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    """Candidates that became output, and candidates verified in vain."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, metrics: Metrics) -> Usage:
        return cls(
            prompt_tokens=metrics.prompt_tokens,
            completion_tokens=metrics.completion_tokens,
            total_tokens=metrics.prompt_tokens + metrics.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=metrics.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=metrics.accepted, rejected_prediction_tokens=metrics.rolled_back
            ),
        )


class TopLogprob(Answer):
    """`bytes` are UTF-8; a token may hold part of a character only."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Of every token of a chat choice, or of a chunk."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(Answer):
    """The older form, of text completions: lists with an entry for each token. Null is known of no first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str


class CalledFunction(Answer):
    """`arguments` is JSON text as the model wrote it, which may not keep to the schema unless that is strict."""

    name: str
    arguments: str


class ChatToolCall(Answer):
    """A call of one of the client's functions."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Answer):
    """`content` is null if there are only calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ChatToolCall] | None = None

    @model_serializer(mode="wrap")
    def _with_content(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **handler(self)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """That of the fields, of which the serializer says nothing."""
        return handler({name: part for name, part in core_schema.items() if name != "serialization"})


class ChatChoice(Answer):
    index: int = 0
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(Answer):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str | None = None
    usage: Usage
    paceline: PacelineInfo


class FunctionDelta(Answer):
    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """The first of a call has its id and name, the others more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: int = 0
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(Answer):
    """One Server-Sent Event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None
    paceline: PacelineInfo | None = None


class CompletionChoice(Answer):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    finish_reason: str | None = None


class Completion(Answer):
    """Answer of POST /v1/completions, and one Server-Sent Event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = None
    paceline: PacelineInfo | None = None


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "paceline"
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Answer):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Answer):
    """Answer of POST /detokenize."""

    prompt: str


class Version(Answer):
    version: str


class SessionCard(Answer):
    """A session: where its KV cache is and how large, and what is stored of its history (seconds since 1970).

    `kv_tier` is device, or where KV goes that the KV cache has no room for: host memory or disk.

    Without a `replica_id` no target replica holds its KV, without `turns` no history is stored.
    """

    object: Literal["session"] = "session"
    session_id: str
    replica_id: str | None = None
    cached_tokens: int
    kv_bytes: int | None = None
    kv_tier: Literal["device", "host", "disk"] | None = None
    running: bool
    history_tokens: int | None = None
    turns: int | None = None
    parent: str | None = None
    created: float | None = None
    updated: float | None = None


class SessionList(Answer):
    object: Literal["list"] = "list"
    data: list[SessionCard]


class SessionMessage(Answer):
    """One of the messages of a session, as it can be sent again."""

    role: str
    content: str
    name: str | None = None
    tool_calls: list[ChatToolCall] | None = None
    tool_call_id: str | None = None

    @classmethod
    def of(cls, message: ChatMessage) -> SessionMessage:
        calls = [
            ChatToolCall(id=each.call_id, function=CalledFunction(name=each.name, arguments=each.arguments))
            for each in message.tool_calls
        ]
        return cls(
            role=message.role,
            content=message.content,
            name=message.name,
            tool_calls=calls or None,
            tool_call_id=message.tool_call_id,
        )


class SessionMessages(Answer):
    """What was said in a session, the oldest first; a session of plain completions has no messages."""

    object: Literal["list"] = "list"
    session_id: str
    data: list[SessionMessage]


class SessionDeleted(Answer):
    object: Literal["session.deleted"] = "session.deleted"
    session_id: str
    deleted: Literal[True] = True


class Relief(Answer):
    """Sessions a replica gave away, with who has them now, and those that stay, with why."""

    object: Literal["relief"] = "relief"
    replica_id: str
    moved: dict[str, str]
    stay: dict[str, str]


class Health(Answer):
    status: Literal["ok"] = "ok"
    model: str


class RouterStatus(Answer):
    """What the router that answers has seen: requests by the reason for their place, replicas lost in an answer."""

    routes: dict[str, int]
    resumptions: int


class Status(Answer):
    """Model and replicas, each replica as it reports itself."""

    model: str
    max_model_len: int
    targets: list[dict[str, Any]]
    drafts: list[dict[str, Any]]
    router: RouterStatus
    autoscaling: dict[str, Any] = {}
