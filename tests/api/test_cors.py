"""Pages of other origins: refused by their browsers, unless the settings let them."""

from __future__ import annotations

import httpx

from paceline.api import create_app
from tests.api.scripted import CHAT, gateway

ORIGIN = "https://chat.example.org"
PREFLIGHT = {"origin": ORIGIN, "access-control-request-method": "POST"}


def client(*origins: str) -> httpx.AsyncClient:
    app = create_app(gateway(), cors_allow_origins=origins)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://paceline")


async def test_no_origin_is_allowed_by_default() -> None:
    async with client() as http:
        response = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers


async def test_an_allowed_origin_may_call_and_read_our_headers() -> None:
    async with client(ORIGIN) as http:
        asked = await http.options(
            "/v1/chat/completions", headers={**PREFLIGHT, "access-control-request-headers": "authorization"}
        )
        answered = await http.post("/v1/chat/completions", json=CHAT, headers={"origin": ORIGIN})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "x-session-id" in answered.headers["access-control-expose-headers"]


async def test_another_origin_is_not_allowed() -> None:
    async with client("https://other.example.org") as http:
        asked = await http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert asked.status_code == 400


async def test_an_error_can_be_read_by_an_allowed_origin_too() -> None:
    async with client(ORIGIN) as http:
        response = await http.post("/v1/chat/completions", json={}, headers={"origin": ORIGIN})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (400, ORIGIN)
