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

import httpx

from paceline.config import API_KEY_VARIABLE, secret
from paceline.errors import ConfigError, PacelineError, Unavailable, by_code
from paceline.ports import is_loopback
from paceline.types import Metrics, SourceMetrics

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0  # between two chunks: a long prompt is computed before the first one


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
    """HTTP connection to one server, with the key in PACELINE_API_KEY if there is one. A context manager."""

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url}: not a URL: {error}", param="url") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url}: not a URL; it looks like http://127.0.0.1:8000", param="url")
        self._model: str | None = None
        key = secret(API_KEY_VARIABLE)
        self._http = httpx.Client(
            base_url=self.url,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=not is_loopback(parsed.host),  # a proxy set for the internet does not know this machine's ports
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

    def chat(self, messages: Sequence[Message], options: ChatOptions, on_text: Callable[[str], None]) -> Answer:
        """Generate one answer, giving its text to `on_text` as it arrives.

        An exception raised by `on_text`, or Ctrl-C, closes the stream; the server then stops generating.
        """
        body = {
            "model": self.model(),
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **options.body(),
        }
        collected = _Collected()
        with self._errors(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for event in sse_events(response.iter_lines()):
                if text := collected.add(event):
                    on_text(text)
        try:
            return collected.answer()
        except (KeyError, TypeError, ValueError):
            raise self._not_paceline() from None

    def _get(self, path: str) -> dict[str, Any]:
        with self._errors():
            response = self._http.get(path)
            if response.is_error:
                raise _error_of(response)
            try:
                body = response.json()
            except ValueError:
                raise self._not_paceline() from None
        if not isinstance(body, dict):
            raise self._not_paceline()
        return body

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
    return _error_from(error, retry_after=float(retry_after) if retry_after.isdigit() else None)


def _error_from(error: Any, retry_after: float | None = None) -> PacelineError:
    if not isinstance(error, Mapping):
        return PacelineError(str(error))
    kind = by_code(str(error.get("code") or error.get("type")))
    return kind(str(error.get("message") or "unknown error"), param=error.get("param"), retry_after=retry_after)
