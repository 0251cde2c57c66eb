"""The console in a browser, over real engines with a real drafter: what a person does with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from paceline.api.state import ClusterStatus, SessionInfo
from paceline.types import Accepted, Delta, FinishReason, Metrics, Verified
from tests.api.scripted import ScriptedTargets, gateway
from tests.console.conftest import Open, Watched
from tests.console.served import EngineTargets, served

pytestmark = pytest.mark.browser

OVER = "#send:not([hidden])"
QUESTION = "w10 w11 w12"


def choose(page: Any, **fields: str) -> None:
    page.click("#open-settings")
    for name, value in fields.items():
        page.fill(f"[name={name}]", value)
    page.keyboard.press("Escape")


def ask(page: Any, text: str = QUESTION) -> None:
    """Send a message and wait for the end of its answer."""
    before = page.locator("#messages li.assistant").count()
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.locator("#messages li.assistant").nth(before).wait_for()
    page.wait_for_selector(OVER)


def answer(page: Any) -> str:
    """The last answer's text."""
    text: str = page.locator("#messages li.assistant .prose").last.inner_text()
    return text


def session(page: Any) -> str:
    name: str = page.inner_text("#session-name")
    return name


@pytest.fixture
def page(open_page: Open, url: str) -> Any:
    found = open_page(url)
    choose(found, max_tokens="24", temperature="0", seed="7")
    return found


def test_the_root_leads_to_the_console(page: Any, url: str) -> None:
    assert page.url.removeprefix(url).partition("#")[0] == "/console"
    assert page.inner_text("#model") == "tiny"


def test_an_answer_is_the_servers(page: Any, url: str) -> None:
    ask(page)
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    assert answer(page).split() == reply["choices"][0]["message"]["content"].split()


def test_accepted_candidates_are_coloured_and_nothing_else(page: Any) -> None:
    ask(page)
    coloured = " ".join(page.locator("#messages .accepted").all_inner_texts()).split()
    told = page.inner_text("#messages .cost")
    assert f"{len(coloured)} of " in told and "candidates accepted" in told
    assert 0 < len(coloured) < len(answer(page).split()) == 24


def test_the_target_is_not_coloured_like_its_drafter(page: Any) -> None:
    ask(page)
    colour = "(node) => getComputedStyle(node).color"
    own, accepted = page.locator("#messages .assistant .prose").first, page.locator("#messages .accepted").first
    assert own.evaluate(colour) != accepted.evaluate(colour)


def test_without_speculation_nothing_is_coloured(page: Any) -> None:
    page.click("#open-settings")
    page.uncheck("[name=speculation]")
    page.keyboard.press("Escape")
    ask(page)
    assert page.locator("#messages .accepted").count() == 0
    assert "no candidates" in page.inner_text("#messages .cost")


def test_a_follow_up_is_appended_to_the_session(page: Any, watched: Watched) -> None:
    ask(page)
    ask(page, "w20")
    sent = [json.loads(body) for body in watched.bodies if "messages" in body]
    assert [len(body["messages"]) for body in sent] == [1, 1]


def begin(page: Any) -> None:
    """Send a message and wait until its answer has begun."""
    page.fill("#message", QUESTION)
    page.keyboard.press("Enter")
    page.locator("#messages li.assistant .prose > *").first.wait_for()


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_can_be_stopped(page: Any, engines: EngineTargets, how: str) -> None:
    engines.hold.clear()
    begin(page)
    page.click("#stop") if how == "button" else page.press("#message", "Escape")
    page.wait_for_selector(OVER)
    assert "stopped" in page.inner_text("#messages .cost")
    assert 0 < len(answer(page).split()) < 24


def test_a_stopped_answer_stays_in_the_conversation(page: Any, engines: EngineTargets, watched: Watched) -> None:
    engines.hold.clear()
    begin(page)
    page.click("#stop")
    page.wait_for_selector(OVER)
    part = answer(page)
    engines.hold.set()
    ask(page, "w20")
    sent = json.loads([body for body in watched.bodies if "messages" in body][-1])["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].split() == part.split()


def test_retry_asks_again(page: Any) -> None:
    ask(page)
    first = answer(page)
    page.click("#retry")
    page.wait_for_selector(OVER)
    assert (page.locator("#messages li").count(), answer(page)) == (2, first)


def test_a_fork_has_the_same_history_under_another_name(page: Any) -> None:
    ask(page)
    said, before = answer(page), session(page)
    page.click("#fork")
    page.locator("#session-name").and_(page.locator(f":not(:text-is('{before}'))")).wait_for()
    assert answer(page) == said
    assert f"fork of {before}" in page.inner_text("#session-facts")


def test_a_stored_session_is_taken_up_again(page: Any) -> None:
    ask(page)
    said, before = answer(page), session(page)
    page.click("#new-chat")
    assert page.locator("#messages li.assistant").count() == 0
    page.click(f"#sessions .open[title='{before}']")
    page.wait_for_selector("#messages li.assistant")
    assert (session(page), answer(page)) == (before, said)


def test_a_deleted_session_is_gone(page: Any, url: str) -> None:
    ask(page)
    name = session(page)
    page.hover(f"#sessions li[data-key='{name}']")
    page.click(f"#sessions li[data-key='{name}'] button[title=Delete]")
    page.locator(f"#sessions li[data-key='{name}']").wait_for(state="detached")
    assert httpx.get(f"{url}/v1/sessions/{name}/messages").status_code == 404


def test_the_map_shows_a_session_where_its_kv_is(page: Any, url: str) -> None:
    ask(page)
    name = session(page)
    home = httpx.get(f"{url}/v1/sessions/{name}").json()["replica_id"]
    page.click("nav a[data-view=cluster]")
    page.click(f"#map .column[data-key='{home}'] .tile[data-key='{name}']")
    assert f"KV at\n{home}" in page.inner_text("#detail")


def test_a_session_is_closed_from_the_map(page: Any) -> None:
    ask(page)
    name = session(page)
    page.click("nav a[data-view=cluster]")
    page.click(f"#map .tile[data-key='{name}']")
    page.click("#detail .danger")
    page.locator(f"#map .tile[data-key='{name}']").wait_for(state="detached")
    assert page.locator("#detail").is_hidden()


def test_the_cluster_view_follows_the_engines(page: Any) -> None:
    ask(page)
    page.click("nav a[data-view=cluster]")
    page.wait_for_selector("#targets .card")
    assert page.locator("#targets .card h3").all_inner_texts() == ["one", "two"]
    assert page.inner_text("#sources th") == "local"


def test_a_seed_of_64_bits_goes_out_and_comes_back_whole(page: Any, watched: Watched) -> None:
    choose(page, seed="18446744073709551615")
    ask(page)
    assert '"seed":18446744073709551615' in [body for body in watched.bodies if "messages" in body][-1]
    assert "seed 18446744073709551615" in page.inner_text("#messages .cost")


def test_the_key_is_sent_and_kept_for_the_tab_alone(page: Any, watched: Watched) -> None:
    choose(page, key="sk-secret")
    ask(page)
    assert [headers.get("authorization") for path, headers in watched.asked if "/v1/" in path][-1] == "Bearer sk-secret"
    assert "sk-secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_reloaded_page_has_the_key_from_its_first_request_on(page: Any, watched: Watched) -> None:
    choose(page, key="sk-secret")
    ask(page)
    watched.asked.clear()
    page.reload()
    page.wait_for_selector("#health.well")
    keys = {headers.get("authorization") for path, headers in watched.asked if path.startswith("/v1/")}
    assert keys == {"Bearer sk-secret"}


def test_a_refused_key_says_what_to_do(page: Any, watched: Watched) -> None:
    watched.expected = ("401",)
    refusal = json.dumps({"error": {"message": "no API key was given", "code": "invalid_api_key"}})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, body=refusal))
    page.fill("#message", QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:not([hidden])")
    assert page.inner_text("#notice p") == "no API key was given – Set an API key under Settings."
    assert page.input_value("#message") == QUESTION


def test_a_server_that_is_gone_is_said_so(page: Any, watched: Watched) -> None:
    watched.expected = ("ERR_FAILED",)
    page.route("**/v1/sessions", lambda route: route.abort())
    page.wait_for_selector("#health.ill")
    assert "The server does not answer" in page.inner_text("#notice p")


@pytest.mark.parametrize("width", [360, 1280])
def test_no_view_is_wider_than_the_window(open_page: Open, url: str, width: int) -> None:
    page = open_page(url, viewport={"width": width, "height": 700})
    choose(page, max_tokens="24")
    ask(page, " ".join([QUESTION] * 20))
    for view in ("chat", "cluster"):
        page.click(f"nav a[data-view={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name(page: Any) -> None:
    ask(page)
    page.wait_for_selector("#sessions button")
    nameless = """[...document.querySelectorAll("button, input, select, textarea")].filter((node) =>
        !(node.textContent.trim() || node.ariaLabel || node.labels?.length)).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []


# What a model writes, and what no engine here shows: a page over scripted replicas.

EVIL = '<img src=x onerror="alert(1)"> <script>alert(2)</script> [go](javascript:alert(3)) **strong** `code`'
ANSWER = (
    Accepted("target-1", 7, 4),
    Delta((10, 11), EVIL, verified=Verified("prompt_lookup", 3, 1, 4)),
    Delta(
        (12,),
        "\n\n1. one\n2. two\n\n```\n*raw*\n```\n",
        FinishReason.STOP,
        Metrics(prompt_tokens=4, completion_tokens=3),
    ),
)


@pytest.fixture
def scripted() -> Iterator[tuple[str, ScriptedTargets]]:
    targets = ScriptedTargets(ANSWER)
    targets.held = [
        SessionInfo("busy", "target-1", 900, True, 9000, "device"),
        SessionInfo("cold", "target-1", 90, False, 900, "disk"),
        SessionInfo("idle", "target-2", 400, False, 4000, "host"),
    ]
    targets.cluster = ClusterStatus(
        targets=tuple({"replica_id": f"target-{n}", "warnings": ["drafters are late"]} for n in (1, 2, 9)),
        drafts=({"replica_id": "draft-1", "model": "small", "drafted_tokens": 10, "rolled_back_tokens": 5},),
    )
    with served(gateway(targets)) as url:
        yield url, targets


def test_what_a_model_writes_is_text(open_page: Open, scripted: tuple[str, ScriptedTargets]) -> None:
    page = open_page(scripted[0])
    choose(page, max_tokens="24")
    ask(page)
    prose = page.locator("#messages .assistant .prose")
    assert EVIL.replace("**strong**", "strong").replace("`code`", "code") in prose.inner_text()
    assert prose.locator("img, script, a").count() == 0


def test_markdown_is_rendered_and_keeps_its_colours(open_page: Open, scripted: tuple[str, ScriptedTargets]) -> None:
    page = open_page(scripted[0])
    choose(page, max_tokens="24")
    ask(page)
    prose = page.locator("#messages .assistant .prose")
    assert (prose.locator("strong").inner_text(), prose.locator("pre").inner_text()) == ("strong", "*raw*")
    assert prose.locator(".item").all_inner_texts() == ["one", "two"]
    accepted = prose.locator(".accepted")
    assert (accepted.inner_text(), accepted.get_attribute("data-source")) == ("<img", "prompt_lookup")


def test_tiers_and_running_sessions_differ(open_page: Open, scripted: tuple[str, ScriptedTargets]) -> None:
    page = open_page(scripted[0])
    page.click("nav a[data-view=cluster]")
    page.wait_for_selector(".tile")
    classes = {name: page.get_attribute(f".tile[data-key={name}]", "class") for name in ("busy", "cold", "idle")}
    assert classes == {"busy": "tile device running", "cold": "tile disk ", "idle": "tile host "}


def test_a_warning_is_shown_once_with_its_replicas(open_page: Open, scripted: tuple[str, ScriptedTargets]) -> None:
    page = open_page(scripted[0])
    page.click("nav a[data-view=cluster]")
    page.wait_for_selector("#warnings li")
    assert page.locator("#warnings li").all_inner_texts() == ["drafters are late [target-1, target-2, target-9]"]


def test_a_session_is_moved_from_the_map(open_page: Open, scripted: tuple[str, ScriptedTargets]) -> None:
    page = open_page(scripted[0])
    page.click("nav a[data-view=cluster]")
    page.click(".tile[data-key=idle]")
    page.select_option("#detail select", "target-9")
    page.wait_for_selector(".column[data-key=target-9] .tile[data-key=idle]")
    assert "KV at\ntarget-9" in page.inner_text("#detail")


def test_a_session_that_cannot_move_says_why(
    open_page: Open, scripted: tuple[str, ScriptedTargets], watched: Watched
) -> None:
    watched.expected = ("503",)
    page = open_page(scripted[0])
    page.click("nav a[data-view=cluster]")
    page.click(".tile[data-key=idle]")
    page.select_option("#detail select", "target-1")
    page.wait_for_selector("#notice:not([hidden])")
    assert "stays where it is: without a peer" in page.inner_text("#notice p")


# Markdown.

RENDERED = """async (pieces) => {
  const { Tinted, render } = await import("/console/prose.js");
  const tinted = new Tinted();
  const node = document.createElement("div");
  for (const piece of pieces) {
    tinted.add(piece);
    render(node, tinted);
  }
  return [...node.children].map((block) => block.outerHTML.replace(/ (data-block|style|class|tabindex)="[^"]*"/g, ""));
}"""
PROSE = {
    "a *b* **c** __d__ `e`": ["<p>a <em>b</em> <strong>c</strong> <strong>d</strong> <code>e</code></p>"],
    "**a *b* c**": ["<p><strong>a <em>b</em> c</strong></p>"],
    "2*3*4 and snake_case_name": ["<p>2*3*4 and snake_case_name</p>"],
    "an open **mark and `tick": ["<p>an open **mark and `tick</p>"],
    "`` a`b ``": ["<p><code> a`b </code></p>"],
    "one\ntwo\n\nthree": ["<p>one\ntwo</p>", "<p>three</p>"],
    "## Title\ntext": ['<p role="heading" aria-level="2">Title</p>', "<p>text</p>"],
    "- a\n  - b": ['<div data-mark="•"><div>a</div></div>', '<div data-mark="•"><div>b</div></div>'],
    "7. a": ['<div data-mark="7."><div>a</div></div>'],
    "> said": ["<blockquote>said</blockquote>"],
    "```py\nx = *1*\n\ny": ["<pre><code>x = *1*\n\ny</code></pre>"],
    "````\n```\n````\nz": ["<pre><code>```</code></pre>", "<p>z</p>"],
    "<b>&amp;": ["<p>&lt;b&gt;&amp;amp;</p>"],
}


@pytest.mark.parametrize("text", PROSE)
def test_markdown_becomes_elements(open_page: Open, url: str, text: str) -> None:
    assert open_page(url).evaluate(RENDERED, [text]) == PROSE[text]


def test_a_text_that_grows_looks_in_the_end_as_if_it_came_at_once(open_page: Open, url: str) -> None:
    page, text = open_page(url), "\n\n".join(PROSE)
    assert page.evaluate(RENDERED, list(text)) == page.evaluate(RENDERED, [text])
