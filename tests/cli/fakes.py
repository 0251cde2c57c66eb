"""A scripted HTTP server and a cluster that starts nothing: what the commands are tested against."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

MODEL = "tiny"
DEFAULT_STATUS = {
    "model": MODEL,
    "targets": [{"replica_id": "aaa", "drafters_known": 1, "drafters_connected": 1}],
    "drafts": [{"replica_id": "bbb", "address": "10.0.0.1:7"}],
}


@dataclass(frozen=True)
class Refusal:
    """An answer that is an HTTP error."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, code: str, message: str, **headers: str) -> Refusal:
    """OpenAI's error envelope."""
    return Refusal(status, json.dumps({"error": {"message": message, "code": code, "param": None}}).encode(), headers)


def answer_events(
    texts: Sequence[str] = ("Par", "is."), *, tokens: Sequence[int] = (1, 2, 3), drafted: int = 4, **extra: Any
) -> list[dict[str, Any]]:
    """The chunks of one streamed answer, the way the server sends them."""
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    info = {
        "replica_id": "aaa",
        "session_id": "s",
        "seed": 7,
        "drafted_tokens": drafted,
        "accepted_tokens": min(3, drafted),
        "late_drafts": 0,
        "steps": 2,
        "cached_tokens": 5,
        "ttft_s": 0.25,
        "total_s": 1.25,
        "token_ids": list(tokens),
        **extra,
    }
    usage = {"prompt_tokens": 12, "completion_tokens": len(tokens), "total_tokens": 12 + len(tokens)}
    return [*chunks, {"choices": [], "usage": usage, "paceline": info}]


class FakeServer:
    """Answers from `answers`, one after the other, and remembers the bodies it was sent in `requests`, `paths` and
    `headers` beside them. `sessions` and `said`, by session, are what it stores; of `metrics` the last one stays."""

    def __init__(self) -> None:
        self.answers: list[Sequence[Mapping[str, Any]] | Refusal] = []
        self.requests: list[dict[str, Any]] = []
        self.status: Any = DEFAULT_STATUS
        self.metrics = [""]
        self.models: Any = {"object": "list", "data": [{"id": MODEL}]}
        self.sessions: list[dict[str, Any]] = []
        self.said: dict[str, list[tuple[str, str]]] = {}
        self.paths: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self.url = ""

    def page(self, path: str) -> Refusal:
        """What is found under a path."""
        name = unquote(path.removeprefix("/v1/sessions/").removesuffix("/messages"))
        cards = {card["session_id"]: card for card in self.sessions}
        if path == "/metrics":
            return Refusal(200, (self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0]).encode())
        if path == "/v1/sessions":
            found: Any = {"data": self.sessions}
        elif path.endswith("/messages") and name in self.said:
            found = {"data": [{"role": role, "content": content} for role, content in self.said[name]]}
        elif path.startswith("/v1/sessions/") and not path.endswith("/messages") and name in cards:
            found = cards[name]
        elif path.startswith("/v1/sessions/"):
            return refusal(404, "session_not_found", f"nobody holds {name}")
        else:
            found = {"/status": self.status, "/v1/models": self.models}.get(path)
        return Refusal(404, b"nothing here") if found is None else Refusal(200, json.dumps(found).encode())


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Run `server` on a free port."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(server.page(self.path))

        def do_POST(self) -> None:
            server.paths.append(self.path)
            server.headers.append(dict(self.headers.items()))
            server.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            found = {"session_id": "forked"} if self.path.endswith("/fork") else server.answers.pop(0)
            if isinstance(found, dict):
                self._send(Refusal(200, json.dumps(found).encode()))
                return
            if isinstance(found, Refusal):
                self._send(found)
                return
            lines = [f"data: {json.dumps(event)}\n\n" for event in found]
            self._send(Refusal(200, "".join([": ping\n\n", *lines, "data: [DONE]\n\n"]).encode()))

        def _send(self, response: Refusal) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(response.body)))
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@dataclass(frozen=True)
class FakeEndpoints:
    http: str = "http://127.0.0.1:8000"
    grpc: str = "127.0.0.1:9000"


class FakeCluster:
    """Stands in for `LocalCluster`. `on_start` runs in `start`; what it raises is what `start` raises."""

    def __init__(self, endpoints: FakeEndpoints, on_start: Callable[[], None] = lambda: None) -> None:
        self.endpoints = endpoints
        self.on_start = on_start
        self.deployment: dict[str, Any] | None = None
        self.stopped = 0

    def __call__(self, deployment: dict[str, Any], *, on_status: Callable[[str], None]) -> FakeCluster:
        self.deployment = deployment
        self.on_status = on_status
        return self

    def start(self) -> FakeEndpoints:
        self.on_status("deploying")
        self.on_start()
        return self.endpoints

    def stop(self) -> None:
        self.stopped += 1
