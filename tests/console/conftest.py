"""A headless Chromium, and a watch over what must never happen in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.console.served import EngineTargets, served, tiny_gateway, tiny_targets

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", ({ violatedDirective: rule, blockedURI: what }) =>
  violations.push(`${rule} ${what}`));
"""


@dataclass
class Watched:
    """What a page did beside its work. `asked` has path and headers of its requests, `expected` are errors that a test
    brings about."""

    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    @property
    def unexpected(self) -> list[str]:
        return [error for error in self.errors if not any(word in error for word in self.expected)]


Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no Chromium here: the console is NOT tested in a browser; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def open_page(browser: Any, watched: Watched) -> Iterator[Open]:
    """Opens the console of a server. In the end nothing outside was asked for, no policy broken, no error logged."""
    pages: list[Any] = []

    def go(url: str, **options: Any) -> Any:
        page = browser.new_page(**options)
        pages.append(page)
        page.set_default_timeout(10_000)
        page.add_init_script(VIOLATIONS)
        page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))

        def note(request: Any) -> None:
            if not request.url.startswith(url):
                watched.elsewhere.append(request.url)
            watched.asked.append((request.url.removeprefix(url), request.headers))
            watched.bodies.append(request.post_data or "")

        page.on("request", note)
        page.goto(f"{url}/")
        return page

    yield go
    violations = [each for page in pages for each in page.evaluate("violations")]
    for page in pages:
        page.close()
    assert (watched.elsewhere, violations, watched.unexpected) == ([], [], [])


@pytest.fixture(scope="module")
def engines() -> Iterator[EngineTargets]:
    targets = tiny_targets("one", "two")
    yield targets
    targets.stop()


@pytest.fixture
def url(engines: EngineTargets) -> Iterator[str]:
    """The console over two real engines."""
    with served(tiny_gateway(engines)) as address:
        yield address
        engines.hold.set()
