"""The OpenAI-compatible HTTP API, and beside it sessions, status and health."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from paceline.api.access import Access, KeyCheck
from paceline.api.answers import (
    Answer,
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    Relief,
    RouterStatus,
    SessionCard,
    SessionDeleted,
    SessionList,
    SessionMessage,
    SessionMessages,
    Status,
    Tokens,
    Version,
)
from paceline.api.answers_responses import ResponseDeleted, ResponseObject
from paceline.api.body import CheckedRoute
from paceline.api.console import console_router
from paceline.api.dependencies import TheGateway
from paceline.api.failures import JSONBytes, install_error_handlers
from paceline.api.gateway import Gateway, Prepared
from paceline.api.metrics import CONTENT_TYPE, prometheus_text
from paceline.api.middleware import BodyLimit, HeadLimit, LastResort, RequestId
from paceline.api.openapi import Error, describe
from paceline.api.reply import Reply
from paceline.api.request_counts import RequestCounts
from paceline.api.responses import Responses
from paceline.api.routes_nodes import nodes_router
from paceline.api.schema import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationBody,
)
from paceline.api.schema_responses import ResponsesRequest
from paceline.api.schema_sessions import CreateSessionBody, ForkSessionBody, MoveSessionBody, RelieveBody
from paceline.api.schema_tokens import DetokenizeRequest, EmbeddingsRequest, TokenizeRequest
from paceline.api.state import ClusterStatus, SessionInfo
from paceline.api.wording import ChatWording
from paceline.api.wording_completion import CompletionWording
from paceline.config import LimitSettings
from paceline.errors import InvalidRequest, PacelineError

logger = logging.getLogger(__name__)

SESSION_ID_HEADER = "x-session-id"
EXPOSED_HEADERS = (SESSION_ID_HEADER, "x-request-id", "x-paceline-replica", "x-paceline-route", "retry-after")
"""What a page of another origin may read of an answer's headers."""

router = APIRouter(route_class=CheckedRoute)


def create_app(
    gateway: Gateway | Callable[[], Gateway],
    *,
    limits: LimitSettings | None = None,
    access: Access | None = None,
    request_ids: bool = True,
    cors_allow_origins: Sequence[str] = (),
) -> FastAPI:
    """The HTTP application over a gateway, or over whatever `gateway()` returns when a request arrives.

    The second form is for an application that is built in one process and served in another. `access` None lets
    everybody do everything. `request_ids` off leaves `x-request-id` to the server in front: Ray Serve's adds one of
    its own, and two would be sent.
    """
    app = FastAPI(title="Paceline", version=version("paceline"), generate_unique_id_function=lambda route: route.name)
    describe(app)
    app.state.gateway = gateway
    app.state.requests = requests = RequestCounts()
    app.include_router(router)
    app.include_router(nodes_router)
    app.include_router(console_router)
    install_error_handlers(app)
    limits = limits or LimitSettings()
    app.add_middleware(BodyLimit, limits=limits)
    if access is not None:
        app.add_middleware(KeyCheck, access=access)
    app.add_middleware(HeadLimit, limits=limits)
    app.add_middleware(LastResort)
    app.add_middleware(requests.counting)
    if cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    if request_ids:
        app.add_middleware(RequestId)  # added last, so it is the outermost
    return app


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatCompletionRequest, request: Request, gateway: TheGateway) -> Response:
    prepared = await gateway.prepare_chat(
        [message.message() for message in body.messages],
        body.params(),
        model=body.model,
        session_id=_session_id(request, body),
        speculate=body.speculation is not False,
        priority=body.priority or 0,
        tools=body.tool_use(),
    )
    return _chat_reply(gateway, prepared, body)


@router.post("/v1/completions", response_model=Completion)
async def completions(body: CompletionRequest, request: Request, gateway: TheGateway) -> Response:
    session_id = _session_id(request, body)
    if session_id is not None and len(body.prompt) > 1:
        raise InvalidRequest("session_id: only with one prompt", param="session_id")
    params = body.params().with_seed()  # every prompt of a list has the same
    prepared = [
        await gateway.prepare_completion(
            prompt,
            params,
            model=body.model,
            session_id=session_id,
            speculate=body.speculation is not False,
            priority=body.priority or 0,
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        )
        for prompt in body.prompt
    ]
    wording = CompletionWording(
        prepared[0].request.request_id,
        **_form(gateway, body),
        echo=tuple(gateway.text_of(prompt) for prompt in body.prompt) if body.echo else None,
        told_prompt=body.prompt_logprobs,
        silent=body.max_tokens == 0,
    )
    return Reply(gateway, prepared, wording, stream=bool(body.stream))


@router.post("/v1/responses", response_model=ResponseObject)
async def create_response(body: ResponsesRequest, gateway: TheGateway) -> Response:
    """One turn of a conversation that is stored here: `previous_response_id` goes on from an earlier one."""
    prepared, wording = await Responses(gateway).prepare(body)
    return Reply(gateway, [prepared], wording, stream=bool(body.stream))


@router.get("/v1/responses/{response_id}", response_model=ResponseObject)
async def get_response(response_id: str, gateway: TheGateway, stream: bool = False) -> Response:
    if stream:
        raise InvalidRequest("stream: a stored response is sent whole; leave it out", param="stream")
    return JSONBytes(await Responses(gateway).get(response_id))


@router.delete("/v1/responses/{response_id}", response_model=ResponseDeleted)
async def delete_response(response_id: str, gateway: TheGateway) -> Response:
    """Forget a response. Its session goes with the last one."""
    await Responses(gateway).delete(response_id)
    return _json(ResponseDeleted(id=response_id))


@router.get("/v1/models", response_model=ModelList)
async def list_models(gateway: TheGateway) -> Response:
    return _json(ModelList(data=[_model_card(gateway)]))


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def get_model(name: str, gateway: TheGateway) -> Response:
    gateway.check_model(name)
    return _json(_model_card(gateway))


@router.post("/v1/embeddings", response_model=Error, response_description="Never.")
async def create_embeddings(body: EmbeddingsRequest, gateway: TheGateway) -> Response:
    """Refused: a model that generates text has no pooling that makes sense."""
    gateway.check_model(body.model)
    raise InvalidRequest(
        f"model: {gateway.model_name!r} generates text and has no embeddings; ask a server of an embedding model",
        param="model",
    )


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, gateway: TheGateway) -> Response:
    """Token ids of a text, or of a conversation as the chat template renders it."""
    tokens = await gateway.tokenize(
        body.content(),
        model=body.model,
        tools=[each.function.tool() for each in body.tools or ()],
        special=body.add_special_tokens is not False,
    )
    texts = [gateway.token_texts.text_of(token) for token in tokens] if body.return_token_strs else None
    return _json(Tokens(count=len(tokens), max_model_len=gateway.max_model_len, tokens=list(tokens), token_strs=texts))


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, gateway: TheGateway) -> Response:
    """The text of token ids, special ones included."""
    return _json(Detokenized(prompt=await gateway.detokenize(body.tokens, model=body.model, param="tokens")))


@router.post("/v1/sessions", response_model=SessionCard)
async def create_session(body: CreateSessionBody, gateway: TheGateway) -> Response:
    """A session to which turns are appended, so that no client resends what was said."""
    messages = [message.message() for message in body.messages or ()]
    return _json(_session_card(await gateway.create_session(body.session_id, messages, body.seed)))


@router.post("/v1/sessions/{session_id:path}/turns", response_model=ChatCompletion)
async def append_turn(session_id: str, body: ChatCompletionRequest, request: Request, gateway: TheGateway) -> Response:
    """As /v1/chat/completions, but `messages` are only what is new; the session has the rest."""
    if _session_id(request, body) not in (None, session_id):
        raise InvalidRequest("session_id: contradicts the path", param="session_id")
    prepared = await gateway.prepare_turn(
        session_id,
        [message.message() for message in body.messages],
        body.params(),
        model=body.model,
        speculate=body.speculation is not False,
        priority=body.priority or 0,
        tools=None if body.tools is None and body.tool_choice is None else body.tool_use(),
    )
    return _chat_reply(gateway, prepared, body)


@router.post("/v1/sessions/{session_id:path}/fork", response_model=SessionCard)
async def fork_session(session_id: str, gateway: TheGateway, body: ForkSessionBody | None = None) -> Response:
    """Another session with the same history, and the same KV where it is held."""
    return _json(_session_card(await gateway.fork_session(session_id, body.session_id if body else None)))


@router.post("/v1/sessions/{session_id:path}/move", response_model=SessionCard)
async def move_session(session_id: str, gateway: TheGateway, body: MoveSessionBody | None = None) -> Response:
    """Hand its KV to another replica; the next turn goes there."""
    return _json(_session_card(await gateway.move_session(session_id, body.replica if body else None)))


@router.post("/v1/replicas/{replica_id}/relieve", response_model=Relief)
async def relieve(replica_id: str, body: RelieveBody, gateway: TheGateway) -> Response:
    """Hand some of a target replica's idle sessions, those used last, to the others."""
    outcome = await gateway.relieve(replica_id, body.sessions)
    return _json(Relief(replica_id=replica_id, moved=outcome.arrived, stay=outcome.left))


@router.get("/v1/sessions", response_model=SessionList)
async def list_sessions(gateway: TheGateway) -> Response:
    return _json(SessionList(data=[_session_card(session) for session in await gateway.sessions()]))


@router.get("/v1/sessions/{session_id:path}/messages", response_model=SessionMessages)
async def get_messages(session_id: str, gateway: TheGateway) -> Response:
    """What was said, for a client that takes a session up again."""
    said = [SessionMessage.of(message) for message in await gateway.messages(session_id)]
    return _json(SessionMessages(session_id=session_id, data=said))


@router.get("/v1/sessions/{session_id:path}", response_model=SessionCard)
async def get_session(session_id: str, gateway: TheGateway) -> Response:
    return _json(_session_card(await gateway.session(session_id)))


@router.delete("/v1/sessions/{session_id:path}", response_model=SessionDeleted)
async def close_session(session_id: str, gateway: TheGateway) -> Response:
    await gateway.close_session(session_id)
    return _json(SessionDeleted(session_id=session_id))


@router.get("/health", response_model=Health)
async def health(gateway: TheGateway) -> Response:
    """This front end runs. Whether its replicas do is in /status."""
    return _json(Health(model=gateway.model_name))


@router.get("/ping", response_model=Health)
async def ping(gateway: TheGateway) -> Response:
    """As /health, by the name that SageMaker asks for."""
    return _json(Health(model=gateway.model_name))


@router.get("/version", response_model=Version)
async def get_version() -> Response:
    return _json(Version(version=version("paceline")))


@router.get("/status", response_model=Status)
async def status(gateway: TheGateway) -> Response:
    cluster = await gateway.status()
    return _json(
        Status(
            model=gateway.model_name,
            max_model_len=gateway.max_model_len,
            targets=[dict(replica) for replica in cluster.targets],
            drafts=[dict(replica) for replica in cluster.drafts],
            router=RouterStatus(routes=dict(cluster.routes), resumptions=cluster.resumptions),
            autoscaling=dict(cluster.autoscaling),
        )
    )


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, gateway: TheGateway) -> Response:
    """Prometheus text. Replicas that do not answer in time are missing."""
    try:
        cluster = await gateway.status()
    except PacelineError as error:
        logger.warning("no metrics of any replica: %s", error.message)
        cluster = gateway.with_own_counts(ClusterStatus())
    counts: RequestCounts = request.app.state.requests
    seen = replace(cluster, requests=counts.by_endpoint_and_code)
    return Response(prometheus_text(gateway.model_name, seen), media_type=CONTENT_TYPE)


def _json(answer: Answer) -> Response:
    return JSONBytes(answer.json_bytes())


def _chat_reply(gateway: Gateway, prepared: Prepared, body: ChatCompletionRequest) -> Reply:
    readers = gateway.readers(prepared.tools)
    wording = ChatWording(prepared.request.request_id, **_form(gateway, body), readers=readers)
    return Reply(gateway, [prepared], wording, stream=bool(body.stream))


def _form(gateway: Gateway, body: GenerationBody) -> dict[str, Any]:
    return {
        "model": gateway.model_name,
        "texts": gateway.token_texts,
        "created": int(time.time()),
        "include_usage": body.include_usage,
        "return_token_ids": body.return_token_ids is True,
        "synthetic_acceptance": gateway.synthetic_acceptance,
    }


def _session_id(request: Request, body: GenerationBody) -> str | None:
    """The session the client names, in the header or the body. Both may, if they agree."""
    header = request.headers.get(SESSION_ID_HEADER)
    if header is None:
        return body.session_id
    try:
        named = header.encode("latin-1").decode()  # Starlette reads headers as Latin-1; they are UTF-8
    except UnicodeDecodeError:
        raise InvalidRequest(f"{SESSION_ID_HEADER}: not UTF-8", param="session_id") from None
    if body.session_id is not None and body.session_id != named:
        raise InvalidRequest(f"session_id: contradicts the header {SESSION_ID_HEADER}", param="session_id")
    return named


def _model_card(gateway: Gateway) -> ModelCard:
    return ModelCard(id=gateway.model_name, created=gateway.created, max_model_len=gateway.max_model_len)


def _session_card(session: SessionInfo) -> SessionCard:
    return SessionCard(**asdict(session))
