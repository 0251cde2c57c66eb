"""The console's files as a browser gets them."""

from __future__ import annotations

import re

import httpx
import pytest

from paceline.api.console.routes import ASSETS, SECURITY, assets
from tests.api.scripted import http

NAMES = sorted(assets())


async def got(path: str, **headers: str) -> httpx.Response:
    async with http() as client:
        return await client.get(path, headers=headers)


async def test_the_console_is_a_page() -> None:
    response = await got("/console")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("main.js", "text/javascript"),
        ("console.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("index.html", "text/html"),
    ],
)
async def test_a_file_has_its_type(name: str, kind: str) -> None:
    response = await got(f"/console/{name}")
    assert (response.status_code, response.headers["content-type"].partition(";")[0]) == (200, kind)


@pytest.mark.parametrize("name", NAMES)
async def test_every_file_is_sent_with_the_policy(name: str) -> None:
    headers = (await got(f"/console/{name}")).headers
    assert SECURITY.items() <= dict(headers).items()


def test_the_policy_lets_nothing_in_from_elsewhere_and_no_inline_script() -> None:
    policy = SECURITY["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"unsafe|https?:|\*|data:", policy)


async def test_a_browser_is_sent_to_the_console() -> None:
    response = await got("/", accept="text/html,application/xhtml+xml")
    assert (response.status_code, response.headers["location"], response.headers["vary"]) == (307, "console", "accept")


async def test_an_api_client_finds_nothing_at_the_root() -> None:
    response = await got("/", accept="application/json")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_a_file_that_is_there_already_is_not_sent_again() -> None:
    first = await got("/console/main.js")
    again = await got("/console/main.js", **{"if-none-match": first.headers["etag"]})
    assert (first.headers["cache-control"], again.status_code, again.content) == ("no-cache", 304, b"")


async def test_a_file_of_an_older_version_is_sent() -> None:
    assert (await got("/console/main.js", **{"if-none-match": '"0123456789abcdef"'})).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/console/routes.py",
        "/console/../routes.py",
        "/console/..%2froutes.py",
        "/console/%2e%2e/routes.py",
        "/console/..%5croutes.py",
        "/console//etc/passwd",
        "/console/assets/main.js",
        "/console/",
        "/console/main.js%00",
    ],
)
async def test_what_is_no_file_of_the_page_is_not_found(path: str) -> None:
    async with http() as client:
        url = httpx.URL(f"http://paceline{path}", raw_path=path.encode())
        response = await client.get(url)
    assert response.status_code in (404, 307) and b"import" not in response.content


def references(name: str) -> list[str]:
    """Files of the page that one of them names."""
    text = (ASSETS / name).read_text()
    return [
        found.rpartition("/")[2]
        for found in re.findall(r'(?:href|src)="(console/[^"]+)"|from "(\./[^"]+)"', text)
        for found in found
        if found
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    assert [each for each in references(name) if each not in assets()] == []


def test_every_file_is_named_by_another() -> None:
    named = {each for name in NAMES for each in references(name)}
    assert set(NAMES) - named == {"index.html"}


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_server(name: str) -> None:
    text = (ASSETS / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]+", text) == []


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (ASSETS / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", page) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_no_markup_is_made_from_strings(name: str) -> None:
    assert (
        re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", (ASSETS / name).read_text()
        )
        == []
    )
