"""A web server on a loopback port that serves one file, well or badly."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """Serves `content` at any path. Failures are counted down; `ranges` records what each request asked for."""

    content: bytes
    honours_range: bool = True
    cuts: int = 0  # answers to end after half of what they promised
    refusals: int = 0  # answers with `refusal` before the first good one
    refusal: int = 503
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        if self.refusals > 0:
            self.refusals -= 1
            handler.send_response(self.refusal)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = int(re.findall(r"\d+", asked)[0]) if asked and self.honours_range else 0
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cuts > 0:
            self.cuts -= 1
            body = body[: len(body) // 2]
            handler.close_connection = True
        handler.wfile.write(body)


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that gives every request to `answer`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def file_server(content: bytes, **behaviour: int) -> Iterator[FileServer]:
    files = FileServer(content, **behaviour)  # type: ignore[arg-type]
    with serving(files.answer) as address:
        files.url = f"{address}/model.whl"
        yield files
