"""How many HTTP requests were answered, by endpoint and status."""

from __future__ import annotations

from collections import Counter

from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LEFT = 499
"""The client went away, or the server gave up, before there was a status. nginx calls it so."""
OTHER = "other"
"""Whatever has no template: paths that nobody serves, files of the console, what is refused before its path is read."""


class RequestCounts:
    """Since the start of this router. The labels are bounded: clients make up paths, but no templates."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    @property
    def by_endpoint_and_code(self) -> dict[tuple[str, str], int]:
        return dict(self._counts)

    def note(self, scope: Scope, status: int) -> None:
        """Behind the application: it has put the route into the scope."""
        route = scope.get("route")
        self._counts[route.path if isinstance(route, APIRoute) else OTHER, str(status)] += 1

    def counting(self, app: ASGIApp) -> ASGIApp:
        """The middleware, in plain ASGI."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = LEFT

            async def watch(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watch)
            finally:
                self.note(scope, status)

        return counted
