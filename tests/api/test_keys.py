"""API keys: who is let in, what is counted, and what one key knows of another's sessions."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from paceline.api import create_app
from paceline.api.access import Access
from paceline.api.keys import KeyEntry, KeyFile, KeyRing, KeyText, hash_of, new_key, open_keys, parse_keys
from paceline.api.quotas import Bounds, Quota
from paceline.api.state import SessionInfo
from paceline.config import ApiKeySettings
from paceline.errors import ConfigError, Overloaded, Unauthorized
from tests.api.scripted import CHAT, HELLO, Hang, ScriptedTargets, gateway

ALICE, BOB, BOSS = "pl-alice", "pl-bob", "pl-boss"
HI = [{"role": "user", "content": "hi"}]
MORE = [*HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "and?"}]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(*entries: KeyEntry) -> str:
    return "\n".join(entry.line() for entry in entries)


def entry(key: str, name: str, **fields: Any) -> KeyEntry:
    return KeyEntry(name=name, hash=hash_of(key), **fields)


def ring(*entries: KeyEntry, clock: Clock | None = None) -> KeyRing:
    entries = entries or (entry(ALICE, "alice"), entry(BOB, "bob"), entry(BOSS, "boss", admin=True))
    return KeyRing(KeyText(lines(*entries)), clock or Clock())


class House:
    """One server with keys, and a client of it for each key."""

    def __init__(self, *entries: KeyEntry, targets: ScriptedTargets | None = None, metrics: str = "key") -> None:
        self.targets = targets or ScriptedTargets()
        settings = ApiKeySettings(file="unread", metrics=metrics)  # type: ignore[arg-type]
        self._app = create_app(gateway(self.targets), access=Access(ring(*entries), settings))

    def client(self, key: str | None, header: str = "authorization") -> httpx.AsyncClient:
        value = f"Bearer {key}" if header == "authorization" else str(key)
        headers = {} if key is None else {header: value}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://paceline", headers=headers)


@pytest.mark.parametrize("header", ["authorization", "api-key", "x-api-key"])
async def test_a_known_key_is_let_in_however_it_is_sent(header: str) -> None:
    async with House().client(ALICE, header) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.parametrize("key", [None, "pl-mallory", "", "ä"])
async def test_nobody_else_is(key: str | None) -> None:
    house = House()
    async with house.client(None) as client:
        headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert house.targets.requests == []


async def test_a_stranger_s_body_is_not_read() -> None:
    async with House().client(None) as client:
        response = await client.post("/v1/chat/completions", content=b"no json")
    assert response.status_code == 401


async def test_every_route_but_the_open_ones_asks_for_a_key() -> None:
    house = House()
    schema = create_app(gateway()).openapi()["paths"]
    async with house.client(None) as client:
        answers = {
            path: await client.request(method, path.replace("{", "").replace("}", ""))
            for path, methods in schema.items()
            for method in methods
        }
    assert {path for path, answer in answers.items() if answer.status_code != 401} == {"/health"}


@pytest.mark.parametrize("path", ["/", "/console", "/console/main.js"])
async def test_the_console_s_files_need_no_key(path: str) -> None:
    async with House().client(None) as client:
        assert (await client.get(path, headers={"accept": "text/html"})).status_code in (200, 307)


async def test_nobody_reads_what_was_said_under_another_key() -> None:
    house = House()
    async with house.client(ALICE) as alice, house.client(BOB) as bob:
        await alice.post("/v1/chat/completions", json={**CHAT, "session_id": "diary"})
        read = [(await client.get("/v1/sessions/diary/messages")).status_code for client in (alice, bob)]
    assert read == [200, 404]


@pytest.mark.parametrize(
    ("setting", "statuses"), [("open", [200, 200, 200]), ("key", [401, 200, 200]), ("admin", [401, 403, 200])]
)
async def test_metrics_are_for_whom_the_setting_says(setting: str, statuses: list[int]) -> None:
    house, found = House(metrics=setting), []
    for key in (None, ALICE, BOSS):
        async with house.client(key) as client:
            response = await client.get("/metrics")
            found.append(response.status_code)
            assert ("paceline_" in response.text) == (response.status_code == 200)
    assert found == statuses


async def kept(house: House) -> None:
    """Alice has a session of two turns, with KV at a replica."""
    async with house.client(ALICE) as alice:
        assert (await alice.post("/v1/sessions", json={"session_id": "diary"})).status_code == 200
        assert (await alice.post("/v1/sessions/diary/turns", json={"messages": HI})).status_code == 200
    house.targets.held = [SessionInfo("~alice/diary", "target-1", 40, False)]


async def test_a_session_is_found_by_its_own_key() -> None:
    house = House()
    await kept(house)
    async with house.client(ALICE) as alice:
        listed = (await alice.get("/v1/sessions")).json()["data"]
        assert (await alice.post("/v1/sessions/diary/turns", json={"messages": HI})).status_code == 200
    assert [(card["session_id"], card["cached_tokens"], card["turns"]) for card in listed] == [("diary", 40, 1)]
    assert [request.session_id for request in house.targets.requests] == ["~alice/diary"] * 2


@pytest.mark.parametrize("name", ["diary", "~alice/diary"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/sessions/{}", None),
        ("POST", "/v1/sessions/{}/turns", {"messages": HI}),
        ("POST", "/v1/sessions/{}/fork", {"session_id": "mine"}),
        ("DELETE", "/v1/sessions/{}", None),
    ],
)
async def test_another_key_finds_no_such_session(name: str, method: str, path: str, body: Any) -> None:
    house = House()
    await kept(house)
    async with house.client(BOB) as bob:
        response = await bob.request(method, path.format(name), json=body)
        assert (await bob.get("/v1/sessions")).json()["data"] == []
    assert (response.status_code, response.json()["error"]["code"]) == (404, "session_not_found")
    async with house.client(ALICE) as alice:
        assert (await alice.get("/v1/sessions/diary")).json()["turns"] == 1
    assert len(house.targets.held) == 1


async def test_two_keys_may_use_the_same_name_for_two_sessions() -> None:
    house = House()
    await kept(house)
    async with house.client(BOB) as bob:
        assert (await bob.post("/v1/sessions", json={"session_id": "diary"})).status_code == 200
        await bob.post("/v1/chat/completions", json={**CHAT, "session_id": "diary"})
    assert house.targets.requests[-1].session_id == "~bob/diary"


async def test_a_conversation_is_recognized_for_its_own_key_alone() -> None:
    house, names = House(), []
    for key, messages in ((ALICE, HI), (BOB, MORE), (ALICE, MORE)):
        async with house.client(key) as client:
            response = await client.post("/v1/chat/completions", json={"messages": messages})
            names.append(response.headers["x-session-id"])
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/status", None),
        ("POST", "/v1/sessions/diary/move", {}),
        ("POST", "/v1/replicas/target-1/relieve", {"sessions": 1}),
    ],
)
async def test_what_concerns_everybody_needs_admin(method: str, path: str, body: Any) -> None:
    house = House()
    await kept(house)
    async with house.client(ALICE) as alice:
        response = await alice.request(method, path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")


async def test_an_admin_sees_everybody_s_sessions_by_their_owner() -> None:
    house = House()
    await kept(house)
    async with house.client(BOSS) as boss:
        assert [card["session_id"] for card in (await boss.get("/v1/sessions")).json()["data"]] == ["~alice/diary"]
        moved = await boss.post("/v1/sessions/~alice/diary/move")
        assert (moved.status_code, moved.json()["replica_id"]) == (200, "target-9")
        assert (await boss.get("/status")).status_code == 200
        assert (await boss.delete("/v1/sessions/~alice/diary")).status_code == 200


async def test_one_request_too_many_in_a_minute_is_told_when_to_come_again() -> None:
    house = House(entry(ALICE, "alice", requests_per_minute=2))
    async with house.client(ALICE) as client:
        answers = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
        assert (await client.get("/v1/models")).status_code == 200
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[2].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[2].headers["x-ratelimit-reset-requests"] == "60.000s"
    assert answers[2].headers["retry-after"] == "30"
    assert answers[2].json()["error"]["type"] == "rate_limit_error"


async def test_tokens_are_charged_as_they_are_computed() -> None:
    house = House(entry(ALICE, "alice", tokens_per_minute=20))
    async with house.client(ALICE) as client:
        answers = [await client.post("/v1/completions", json={"prompt": "hi" * 5}) for _ in range(3)]
    # 10 of the prompt and 3 of the answer each: 20 - 26 is a debt.
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-tokens"] for answer in answers] == ["7", "0", "0"]
    assert answers[2].headers["retry-after"] == "21"


async def test_requests_at_once_are_counted_until_their_answers_end() -> None:
    house = House(entry(ALICE, "alice", max_concurrent=1), targets=ScriptedTargets([*HELLO[:1], Hang()]))
    async with house.client(ALICE) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await house.targets.hanging.wait()
        second = await client.post("/v1/chat/completions", json=CHAT)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        house.targets.script = HELLO
        third = await client.post("/v1/chat/completions", json=CHAT)
    assert (second.status_code, third.status_code) == (429, 200)


def test_a_minute_s_requests_come_back_with_time() -> None:
    clock = Clock()
    quota = Quota(Bounds(requests_per_minute=1), clock)
    with quota.request():
        pass
    with pytest.raises(Overloaded) as refused, quota.request():
        pass
    assert refused.value.retry_after == pytest.approx(60)
    clock.now += 60
    with quota.request():
        pass


def test_a_key_that_is_made_is_known_by_its_line() -> None:
    key = new_key()
    made = entry(key, "carol", requests_per_minute=5, admin=True)
    assert parse_keys(made.line()) == [made]
    assert KeyRing(KeyText(made.line())).caller(key).name == "carol"
    assert key not in made.line()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    file.write_text(lines(entry(ALICE, "alice"), entry(BOB, "bob")))
    keys = KeyRing(KeyFile(file), clock)
    alice = keys.caller(ALICE)
    file.write_text(lines(entry("pl-new", "alice"), entry(ALICE, "alice")))
    clock.now += 2
    assert keys.caller("pl-new") is keys.caller(ALICE) is alice
    with pytest.raises(Unauthorized):
        keys.caller(BOB)


@pytest.mark.parametrize("text", ["- {name: alice}", "{", "- [", None])
def test_a_file_that_makes_no_sense_any_more_changes_nothing(
    text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    file.write_text(lines(entry(ALICE, "alice")))
    keys = KeyRing(KeyFile(file), clock)
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    clock.now += 2
    with caplog.at_level(logging.ERROR):
        assert keys.caller(ALICE).name == "alice"
    assert "the API keys stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a b, hash: 'sha256:00'}", "api_keys.0.name"),
        ("- {name: a, key: pl-in-plain}", "api_keys.0.key: unknown key"),
        ("- pl-in-plain", "api_keys.0"),
        ("- {name: pl-in-plain, hash", "not readable as YAML"),
        ("\n".join((entry(ALICE, "a").line(), entry(BOB, "a", admin=True).line())), "differ in more than their hash"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_quoting_it(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        KeyRing(KeyText(text))
    assert message in str(refused.value)
    assert "in-plain" not in str(refused.value)


def test_keys_come_from_a_file_or_a_variable_or_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(lines(entry(ALICE, "alice")))
    monkeypatch.setenv("KEYS", file.read_text())
    for settings in (ApiKeySettings(file=str(file)), ApiKeySettings(environment="KEYS")):
        found = open_keys(settings)
        assert found is not None
        assert found.caller(ALICE).name == "alice"
    assert open_keys(ApiKeySettings()) is None
    with pytest.raises(ConfigError, match="NO_SUCH is not set"):
        open_keys(ApiKeySettings(environment="NO_SUCH"))
    with pytest.raises(ConfigError, match="not readable"):
        open_keys(ApiKeySettings(file=str(tmp_path / "none")))
