"""Serves the console at /console. Its files are read once: what is not among them is no file here.

The page asks the same API as every other client, with the key its user gives it; the files themselves hold nothing
that needs one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import RedirectResponse, Response

ASSETS = Path(__file__).with_name("assets")
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY = {
    # Model output is text, and stays it: no inline script or style, nothing from elsewhere, no markup from strings.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

console_router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page, as it is sent."""

    body: bytes
    media_type: str
    etag: str


@cache
def assets() -> Mapping[str, Asset]:
    """Every file of the page by its name."""
    return {path.name: _read(path) for path in sorted(ASSETS.iterdir()) if path.suffix in MEDIA_TYPES}


@console_router.get("/")
async def root(request: Request) -> Response:
    """A browser goes to the console; an API client is told that there is nothing here."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404, "Not Found")
    return RedirectResponse("console", headers={"vary": "accept"})


@console_router.get("/console")
async def page(request: Request) -> Response:
    return _send(request, PAGE)


@console_router.get("/console/{name}")
async def asset(name: str, request: Request) -> Response:
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    """The file, or 304 if the browser has it already. It asks every time, so that an upgrade shows at once."""
    found = assets().get(name)
    if found is None:
        raise HTTPException(404, "Not Found")
    headers = {**SECURITY, "etag": found.etag, "cache-control": "no-cache"}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
