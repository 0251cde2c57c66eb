"""The synchronous client. Safe to share among threads; a stream belongs to one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from paceline.client import calls
from paceline.client.answers import Answer, Collected, Model, Relief, SessionInfo, Started
from paceline.client.calls import Call
from paceline.client.connection import TLS, Connection
from paceline.client.options import (
    ChatOptions,
    GenerateOptions,
    Message,
    TurnOptions,
    chat_request,
    generate_request,
)
from paceline.client.retry import Attempts, Retry
from paceline.errors import PacelineError, SessionConflict
from paceline.types import Delta, Prompt
from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceStub

DEFAULT_ADDRESS = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_RETRY = Retry()

T = TypeVar("T")


class Client:
    """A connection to the server at `address`, "host:port". A context manager.

    `timeout` is each call's in seconds, with its repetitions (`retry`), unless the call has its own; the server's limit
    holds in any case. `tls=True` trusts the system's authorities, a `TLS` says more. An `api_key` is refused where it
    would cross a network unencrypted, unless `allow_plaintext_key`. `metadata` goes along with every call.

    Every method raises Paceline's errors: Unavailable if there is no server, InvalidRequest with the field's name,
    Overloaded and RequestTimeout after the last attempt.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: TLS | bool = False,
        allow_plaintext_key: bool = False,
        timeout: float = DEFAULT_TIMEOUT_S,
        retry: Retry = DEFAULT_RETRY,
        metadata: Iterable[tuple[str, str]] = (),
    ) -> None:
        secured = TLS() if tls is True else tls or None
        self._connection = Connection(address, api_key, secured, tuple(metadata), allow_plaintext_key)
        self._timeout = timeout
        self._retry = retry
        self._channel = _channel(self._connection)
        self._stub: Any = InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; open streams end."""
        self._channel.close()

    def chat(self, messages: Message | Sequence[Message], **options: Unpack[ChatOptions]) -> Answer:
        """The whole answer to a conversation: a text, a message, or all messages so far."""
        return self.stream_chat(messages, **options).answer()

    def stream_chat(self, messages: Message | Sequence[Message], **options: Unpack[ChatOptions]) -> Stream:
        """The same as it comes."""
        return self._stream("Chat", chat_request(messages, options), options)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Answer:
        """What follows on a text or on token ids; no chat template."""
        return self.stream_generate(prompt, **options).answer()

    def stream_generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """The same as it comes."""
        return self._stream("Generate", generate_request(prompt, options), options)

    def session(
        self, session_id: str | None = None, *, messages: Message | Sequence[Message] = (), seed: int | None = None
    ) -> Session:
        """The session of this name; a new one, beginning with `messages`, if there is none. Without a name the server
        makes one up. `seed` is that of every turn without one of its own."""
        try:
            session_id = self._ask(calls.create_session(session_id, messages, seed)).session_id
        except SessionConflict:
            assert session_id is not None
        return Session(self, session_id)

    def sessions(self) -> tuple[SessionInfo, ...]:
        """Every session whose KV cache a replica holds, and the latest of those of which only the history is stored."""
        return self._ask(calls.list_sessions())

    def tokenize(self, content: str | Sequence[Message], *, model: str = "") -> tuple[int, ...]:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        return self._ask(calls.tokenize(content, model))

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids, special tokens included."""
        return self._ask(calls.detokenize(token_ids, model))

    def models(self) -> tuple[Model, ...]:
        return self._ask(calls.models())

    def status(self) -> pb.StatusResponse:
        """The replicas, how busy they are, what speculation brings."""
        return self._ask(calls.status())

    def abort(self, request_id: str) -> bool:
        """End a request of anybody's by its id (`Started.request_id`). Whether it ran."""
        return self._ask(calls.abort(request_id))

    def relieve(self, replica_id: str, sessions: int) -> Relief:
        """Have a target replica hand so many idle sessions, those used last, to others."""
        return self._ask(calls.relieve(replica_id, sessions))

    def drain(self, replica_id: str, *, wait: float | None = None) -> Relief:
        """Have a target replica hand all its sessions to others, waiting so many seconds for turns under way."""
        return self._ask(calls.drain(replica_id, wait))

    def _ask(self, call: Call[T]) -> T:
        attempts = Attempts(self._retry, self._timeout)
        method, headers = getattr(self._stub, call.method), self._connection.headers
        while True:
            try:
                return call.read(method(call.request, timeout=attempts.begin(), metadata=headers))
            except grpc.RpcError as failure:
                error = self._connection.error(failure)
            pause = attempts.pause_after(error, harmless=call.harmless)
            if pause is None:
                raise error
            time.sleep(pause)

    def _stream(self, method: str, request: Any, options: Any) -> Stream:
        timeout = options.get("timeout")
        attempts = Attempts(self._retry, self._timeout if timeout is None else timeout)
        return Stream(self._connection, getattr(self._stub, method), request, attempts)


class Session:
    """A conversation whose history the server keeps: only what is new is sent. Its answers end up in it as well."""

    def __init__(self, client: Client, session_id: str) -> None:
        self.session_id = session_id
        self._client = client

    def __repr__(self) -> str:
        return f"Session({self.session_id!r})"

    def say(self, messages: Message | Sequence[Message], **options: Unpack[TurnOptions]) -> Answer:
        """The answer to what is said next. If it fails, the session is as before.

        A connection that breaks may leave a turn done of which the client never heard: `info().turns` tells.
        """
        return self.stream_say(messages, **options).answer()

    def stream_say(self, messages: Message | Sequence[Message], **options: Unpack[TurnOptions]) -> Stream:
        """The same as it comes. Closed before its end, it leaves the session as before."""
        request = chat_request(messages, options, append=True)
        request.session_id = self.session_id
        return self._client._stream("Chat", request, options)

    def fork(self, fork_id: str | None = None) -> Session:
        """Another session with the same history; both go on by themselves."""
        fork = self._client._ask(calls.fork_session(self.session_id, fork_id))
        return Session(self._client, fork.session_id)

    def info(self) -> SessionInfo:
        """Where it lies and how long it is. Raises UnknownSession if it is gone."""
        return self._client._ask(calls.get_session(self.session_id))

    def move(self, replica_id: str | None = None) -> SessionInfo:
        """Hand its KV cache to another replica, or to a certain one."""
        return self._client._ask(calls.move_session(self.session_id, replica_id))

    def delete(self) -> None:
        """Drop its KV cache and its history."""
        self._client._ask(calls.close_session(self.session_id))


class Stream(Iterator[Delta]):
    """An answer as it comes: iterate over it. Closed, or lost to the garbage collector, it ends the work on the server.

    Begins with the first `next`. Until it has given something it begins anew where `Retry` says so.
    """

    def __init__(
        self,
        connection: Connection,
        method: Callable[..., Any],
        request: Any,
        attempts: Attempts,
    ) -> None:
        self._call: Any = None
        self._closed = False
        self._connection = connection
        self._method = method
        self._request = request
        self._attempts = attempts
        self._waiting: deque[Delta] = deque()
        self._new_collection()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        while not self._waiting:
            if not self._advance():
                raise StopIteration
        return self._waiting.popleft()

    def started(self) -> Started:
        """Who took the request; waits for it."""
        while self._collected.started is None:
            if not self._advance():
                self._collected.answer()  # raises
        return self._collected.started

    def answer(self) -> Answer:
        """All of it, when it is complete; waits for the rest."""
        while self._advance():
            pass
        return self._collected.answer()

    def close(self) -> None:
        """End the work, if it is still going on. May be called again."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _advance(self) -> bool:
        """Take one event; whether there was one. Raises the error of the call."""
        if self._closed:
            return False
        if self._call is None:
            self._begin()
        try:
            event = next(self._call, None)
        except grpc.RpcError as failure:
            if self._closed:
                return False
            self._call = None
            self._begin_anew(self._connection.error(failure))
            return True
        if event is None:
            self._collected.answer()  # raises unless it is complete
            self.close()
            return False
        if (delta := self._collected.add(event)) is not None:
            self._waiting.append(delta)
        return True

    def _begin(self) -> None:
        left = self._attempts.begin()
        self._new_collection()
        self._request.timeout_seconds = left
        self._call = self._method(self._request, timeout=left, metadata=self._connection.headers)

    def _begin_anew(self, error: PacelineError) -> None:
        """After a pause, if this may be tried again; otherwise the error is raised."""
        pause = None if self._collected.began else self._attempts.pause_after(error)
        if pause is None:
            self.close()
            raise error
        time.sleep(pause)

    def _new_collection(self) -> None:
        sampling = self._request.sampling
        self._collected = Collected(sampling.n if sampling.HasField("n") else 1)


def _channel(connection: Connection) -> grpc.Channel:
    credentials = connection.credentials
    if credentials is None:
        return grpc.insecure_channel(connection.address, connection.options)
    return grpc.secure_channel(connection.address, credentials, connection.options)
