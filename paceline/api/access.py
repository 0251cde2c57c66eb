"""Who asks, known before a byte of the body is read: the key, its bounds, and its count while the answer lasts."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.api.failures import error_response
from paceline.api.keys import Caller, KeyRing, presented_key
from paceline.config import ApiKeySettings
from paceline.errors import Forbidden, PacelineError

CALLER = "paceline.caller"
"""In an ASGI scope: who asks, or None where nobody needs a key."""
OPEN_PATHS = frozenset({"/", "/console", "/health", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"})
OPEN_FOLDERS = ("/console/",)
"""What they hold is the same for everybody; what they show, they ask for with a key."""
METRICS_PATH = "/metrics"
READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that cost nothing of the requests of a minute."""


@dataclass(frozen=True, slots=True)
class Access:
    """Keys are needed here: which ones, and for what."""

    keys: KeyRing
    settings: ApiKeySettings


class KeyCheck:
    """Lets a request pass whose key is known and has something left; says how much in the response's headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._keys = access.keys
        self._metrics = access.settings.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or self._open(path):
            await self._app(scope, receive, send)
            return
        try:
            caller = self._keys.caller(presented_key(Headers(scope=scope)))
            if path == METRICS_PATH and self._metrics == "admin" and not caller.admin:
                raise Forbidden("metrics need an API key with `admin`")
        except PacelineError as error:
            await error_response(error)(scope, receive, send)
            return
        # Metrics are of the whole server, whoever may read them.
        scope[CALLER] = None if path == METRICS_PATH else caller
        await self._counted(caller, scope, receive, send)

    def _open(self, path: str) -> bool:
        if path == METRICS_PATH:
            return self._metrics == "open"
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)

    async def _counted(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_bounds(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(caller.quota.headers())
            await send(message)

        try:
            with caller.quota.request(counts=scope["method"] not in READING):
                await self._app(scope, receive, send_with_bounds)
        except PacelineError as error:  # the quota's: those of the application have become responses
            await error_response(error)(scope, receive, send_with_bounds)
