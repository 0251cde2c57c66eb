"""A small synchronous client of a running server: what `chat`, `status` and `demo` need of its HTTP API.

Errors are Paceline's own: the server's error envelope becomes the class that produced it, and a server
that cannot be reached becomes `Unavailable` with the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from paceline.config import API_KEY_VARIABLE, secret
from paceline.errors import ConfigError, PacelineError, Unavailable, by_code
from paceline.ports import is_loopback
from paceline.types import Metrics, SourceMetrics

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0  # between two chunks: a long prompt is computed before the first one


REMEDIES = {
    401: "give a key with --api-key or in PACELINE_API_KEY",
    403: "this API key does not allow it; give another one",
    429: "try again shortly",
}
"""What to do about a status, said behind the server's own words."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How one answer is generated. None leaves the choice to the server."""

    session_id: str | None = None
    speculation: bool = True
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    return_token_ids: bool = False
    ctx_size: int | None = None

    def body(self) -> dict[str, Any]:
        """The request fields that are set."""
        fields = {
            "session_id": self.session_id,
            "speculation": self.speculation,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "return_token_ids": self.return_token_ids or None,
            "ctx_size": self.ctx_size,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step added to an answer: so many tokens, the first `accepted` of which had been candidates."""

    tokens: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer and what it cost, as the server counted it."""

    text: str
    finish_reason: str
    replica_id: str
    session_id: str
    seed: int
    metrics: Metrics
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """`GET /status`: one mapping per replica, as the server sends it."""

    model: str
    targets: tuple[Mapping[str, Any], ...]
    drafts: tuple[Mapping[str, Any], ...]
    raw: Mapping[str, Any]


class Client:
    """HTTP connection to one server. A context manager.

    `api_key` is sent as a bearer token; None is the environment's (PACELINE_API_KEY), if it has one.
    """

    def __init__(self, url: str, *, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url}: not a URL: {error}", param="url") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url}: not a URL; it looks like http://127.0.0.1:8000", param="url")
        self._model: str | None = None
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=not is_loopback(parsed.host),  # a proxy set for the internet does not know this machine's ports
            headers=_authorization(secret(API_KEY_VARIABLE) if api_key is None else api_key),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the model served; asked once."""
        if self._model is None:
            body = self._get("/v1/models")
            try:
                self._model = str(body["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise self._not_paceline() from None
        return self._model

    def status(self) -> ServerStatus:
        """Model and replicas of the server."""
        body = self._get("/status")
        try:
            return ServerStatus(str(body["model"]), tuple(body["targets"]), tuple(body["drafts"]), body)
        except (KeyError, TypeError):
            raise self._not_paceline() from None

    def metrics(self) -> str:
        """`GET /metrics`, as Prometheus reads it."""
        with self._errors():
            response = self._http.get("/metrics")
        if response.is_error:
            raise _error_of(response)
        return response.text

    def sessions(self) -> list[dict[str, Any]]:
        """Every session the server knows, as it tells of them."""
        return self._listed("/v1/sessions")

    def session(self, session_id: str) -> dict[str, Any]:
        """Raises UnknownSession."""
        return self._get(_session_path(session_id))

    def messages(self, session_id: str) -> list[Message]:
        """What was said in a session. Raises UnknownSession."""
        said = self._listed(f"{_session_path(session_id)}/messages")
        return [Message(str(each["role"]), str(each["content"])) for each in said]

    def fork(self, session_id: str, name: str | None = None) -> str:
        """Another session with the same history; its name. Raises UnknownSession, SessionConflict if it exists."""
        body = {} if name is None else {"session_id": name}
        return str(self._request("POST", f"{_session_path(session_id)}/fork", body)["session_id"])

    def chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        on_text: Callable[[str], None],
        *,
        append: bool = False,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> Answer:
        """Generate one answer, giving its text to `on_text` as it arrives, and each step's tokens to `on_step` if
        `return_token_ids` is asked for.

        With `append`, `messages` are only what is new in the session that `options` name. An exception raised by
        `on_text`, or Ctrl-C, closes the stream; the server then stops generating.
        """
        chosen = options.body()
        path = f"{_session_path(chosen.pop('session_id'))}/turns" if append else "/v1/chat/completions"
        body = {
            "model": self.model(),
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **chosen,
        }
        collected = _Collected()
        with self._errors(), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for event in sse_events(response.iter_lines()):
                if (step := _step(event)) is not None:
                    on_step(step)
                if text := collected.add(event):
                    on_text(text)
        try:
            return collected.answer()
        except (KeyError, TypeError, ValueError):
            raise self._not_paceline() from None

    def _get(self, path: str) -> dict[str, Any]:
        return self._request("GET", path)

    def _listed(self, path: str) -> list[dict[str, Any]]:
        found = self._get(path).get("data")
        if not isinstance(found, list):
            raise self._not_paceline()
        return found

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._errors():
            response = self._http.request(method, path, json=body)
            if response.is_error:
                raise _error_of(response)
            try:
                answer = response.json()
            except ValueError:
                raise self._not_paceline() from None
        if not isinstance(answer, dict):
            raise self._not_paceline()
        return answer

    def _not_paceline(self) -> PacelineError:
        return Unavailable(f"{self.url} answers, but not as a Paceline server does; check --url")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn httpx's exceptions into ours."""
        try:
            yield
        except httpx.ConnectError:
            raise Unavailable(
                f"no server at {self.url}; start one with `paceline serve`, or point --url to it"
            ) from None
        except httpx.TimeoutException:
            raise Unavailable(f"{self.url} did not answer in time; see `paceline status --url {self.url}`") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} broke the connection: {error}") from None


class _Collected:
    """The parts of a streamed answer, put together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.finish_reason: str | None = None
        self.usage: Mapping[str, Any] | None = None
        self.extra: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> str:
        """Take one chunk; returns the text it adds."""
        if error := event.get("error"):
            raise _error_from(error)
        self.usage = event.get("usage") or self.usage
        self.extra = event.get("paceline") or self.extra
        text = ""
        for choice in event.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.text.append(text)
        return text

    def answer(self) -> Answer:
        if self.finish_reason is None:
            raise Unavailable("the server ended the stream before the answer was complete; try again")
        if self.usage is None or self.extra is None:
            raise ValueError("no usage")
        return Answer(
            text="".join(self.text),
            finish_reason=self.finish_reason,
            replica_id=str(self.extra["replica_id"]),
            session_id=str(self.extra["session_id"]),
            seed=int(self.extra["seed"]),
            metrics=_metrics(self.usage, self.extra),
            token_ids=tuple(self.extra.get("token_ids") or ()),
        )


def _step(event: Mapping[str, Any]) -> Step | None:
    """Of a chunk, its tokens; None of one that adds none, or counts what others brought."""
    info = event.get("paceline") or {}
    if not event.get("choices") or not info.get("token_ids"):
        return None
    verified = info.get("verified") or {}
    return Step(len(info["token_ids"]), int(verified.get("drafted", 0)), int(verified.get("accepted", 0)))


def _metrics(usage: Mapping[str, Any], extra: Mapping[str, Any]) -> Metrics:
    return Metrics(
        prompt_tokens=int(usage["prompt_tokens"]),
        completion_tokens=int(usage["completion_tokens"]),
        cached_tokens=int(extra["cached_tokens"]),
        drafted=int(extra["drafted_tokens"]),
        accepted=int(extra["accepted_tokens"]),
        late=int(extra["late_drafts"]),
        steps=int(extra["steps"]),
        ttft_s=float(extra["ttft_s"]),
        total_s=float(extra["total_s"]),
        wasted=int(extra.get("wasted_drafts") or 0),
        sources=tuple(
            SourceMetrics(name, tuple(counts["drafted"]), tuple(counts["accepted"]), int(counts.get("wasted") or 0))
            for name, counts in (extra.get("sources") or {}).items()
        ),
    )


def sse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of Server-Sent Events, up to `[DONE]`. Comments and other fields are skipped."""
    for line in lines:
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return
        try:
            event = json.loads(value)
        except ValueError:
            raise Unavailable("the server sent a chunk that is not JSON") from None
        if not isinstance(event, dict):
            raise Unavailable("the server sent a chunk that is not a JSON object")
        yield event


def _error_of(response: httpx.Response) -> PacelineError:
    """The error in a response that is not 2xx: OpenAI's envelope, or the status line of somebody else's."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{response.url} answered {response.status_code} {response.reason_phrase}".rstrip())
    retry_after = response.headers.get("retry-after", "")
    found = _error_from(error, retry_after=float(retry_after) if retry_after.isdigit() else None)
    remedy = f"try again in {retry_after} s" if retry_after.isdigit() else REMEDIES.get(response.status_code)
    return (
        found
        if remedy is None
        else type(found)(f"{found.message}; {remedy}", param=found.param, retry_after=found.retry_after)
    )


def _error_from(error: Any, retry_after: float | None = None) -> PacelineError:
    if not isinstance(error, Mapping):
        return PacelineError(str(error))
    kind = by_code(str(error.get("code") or error.get("type")))
    return kind(str(error.get("message") or "unknown error"), param=error.get("param"), retry_after=retry_after)


def _session_path(session_id: str) -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}"


def _authorization(key: str | None) -> dict[str, str]:
    """The header a key is sent in. Raises ConfigError if none can hold it."""
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key: not printable ASCII; check it, and PACELINE_API_KEY", param="api_key")
    return {"authorization": f"Bearer {key}"}
