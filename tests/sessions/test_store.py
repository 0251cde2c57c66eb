"""One contract, every backend."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError, Unavailable
from paceline.sessions.history import ChatMessage, Session
from paceline.sessions.sqlite_store import SqliteStore
from paceline.sessions.store import MemoryStore, SessionStore
from paceline.sessions.stores import open_store

TTL_S = 100.0
SESSION = Session(
    "s/1 会话",
    token_ids=(5, 0, 49151, 2**31 - 1),
    messages=(ChatMessage("user", "hi\n“you”"), ChatMessage("assistant", "hello", "bot")),
    turns=1,
    seed=2**64 - 1,
    parent="s/0",
    window={"dropped": 3},
    created=10.5,
    updated=11.25,
)


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def redis_store(time: Time) -> SessionStore:
    fakeredis = pytest.importorskip("fakeredis")
    from paceline.sessions.redis_store import RedisStore

    return RedisStore(fakeredis.FakeAsyncRedis(), TTL_S, time)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, time: Time) -> AsyncIterator[SessionStore]:
    made: dict[str, Any] = {
        "memory": lambda: MemoryStore(TTL_S, clock=time),
        "sqlite": lambda: SqliteStore(str(tmp_path / "sessions.db"), TTL_S, time),
        "redis": lambda: redis_store(time),
    }
    opened: SessionStore = made[request.param]()
    yield opened
    await opened.close()


class TestContract:
    async def test_a_session_comes_back_as_it_was(self, store: SessionStore) -> None:
        await store.put(SESSION)
        assert await store.get(SESSION.session_id) == SESSION

    async def test_its_summary_comes_without_history(self, store: SessionStore) -> None:
        await store.put(SESSION)
        assert await store.summary(SESSION.session_id) == SESSION.summary

    async def test_an_unknown_session_is_none(self, store: SessionStore) -> None:
        assert (await store.get("x"), await store.summary("x"), await store.delete("x")) == (None, None, False)

    async def test_what_is_put_replaces(self, store: SessionStore) -> None:
        await store.put(SESSION)
        later = replace(SESSION, turns=2, token_ids=(1,))
        await store.put(later)
        assert await store.get(SESSION.session_id) == later

    async def test_what_is_added_does_not_replace(self, store: SessionStore) -> None:
        assert await store.add(SESSION)
        assert not await store.add(replace(SESSION, turns=2))
        assert await store.get(SESSION.session_id) == SESSION

    async def test_a_deleted_session_is_gone(self, store: SessionStore) -> None:
        await store.put(SESSION)
        assert await store.delete(SESSION.session_id)
        assert await store.get(SESSION.session_id) is None
        assert await store.summaries() == []

    async def test_the_sessions_put_last_are_listed_first(self, store: SessionStore, time: Time) -> None:
        for name in ("a", "b", "c", "a"):
            time.now += 1
            await store.put(Session(name))
        assert [summary.session_id for summary in await store.summaries()] == ["a", "c", "b"]
        assert [summary.session_id for summary in await store.summaries(limit=2)] == ["a", "c"]

    async def test_a_key_leads_to_its_session_once(self, store: SessionStore) -> None:
        await store.link("k", "s")
        assert [await store.claim("k") for _ in range(2)] == ["s", None]

    async def test_a_key_of_several_sessions_leads_to_each_in_turn(self, store: SessionStore) -> None:
        for name in ("s", "t", "s"):
            await store.link("k", name)
        assert [await store.claim("k") for _ in range(4)] == ["s", "t", "s", None]

    async def test_claims_at_once_get_different_sessions(self, store: SessionStore) -> None:
        for n in range(20):
            await store.link("k", str(n))
        found = await asyncio.gather(*(store.claim("k") for _ in range(25)))
        assert sorted(name for name in found if name is not None) == sorted(str(n) for n in range(20))

    async def test_additions_at_once_keep_one(self, store: SessionStore) -> None:
        kept = await asyncio.gather(*(store.add(replace(SESSION, turns=n)) for n in range(10)))
        assert kept.count(True) == 1


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
class TestEnds:
    """Redis ends things by its own clock; see below."""

    def made(self, kind: str, tmp_path: Path, time: Time) -> SessionStore:
        return MemoryStore(TTL_S, clock=time) if kind == "memory" else SqliteStore(str(tmp_path / "s"), TTL_S, time)

    async def test_a_session_ends_after_its_time(self, kind: str, tmp_path: Path, time: Time) -> None:
        store = self.made(kind, tmp_path, time)
        await store.put(SESSION)
        await store.link("k", "s")
        time.now += TTL_S
        assert (await store.get(SESSION.session_id), await store.claim("k")) == (None, None)
        assert await store.summaries() == []
        assert await store.add(SESSION)
        await store.close()

    async def test_putting_it_again_renews_it(self, kind: str, tmp_path: Path, time: Time) -> None:
        store = self.made(kind, tmp_path, time)
        for _ in range(3):
            await store.put(SESSION)
            time.now += TTL_S - 1
        assert await store.get(SESSION.session_id) == SESSION
        await store.close()


async def test_redis_ends_a_session_after_its_time() -> None:
    fakeredis = pytest.importorskip("fakeredis")
    from paceline.sessions.redis_store import RedisStore

    client = fakeredis.FakeAsyncRedis()
    store = RedisStore(client, 100.0)
    await store.put(SESSION)
    await store.link("k", "s")
    left = [await client.pttl(name) for name in await client.keys("paceline:session:*") + await client.keys("*turn*")]
    assert len(left) == 2 and all(99_000 < each <= 100_000 for each in left)


async def test_redis_that_is_not_there_is_unavailable() -> None:
    pytest.importorskip("redis")
    store = open_store("redis://127.0.0.1:1", TTL_S)
    with pytest.raises(Unavailable, match="does not answer"):
        await store.get("s")
    await store.close()


async def test_memory_keeps_a_bounded_number() -> None:
    store = MemoryStore(TTL_S, limit=3)
    for n in range(5):
        await store.put(Session(str(n)))
    assert [summary.session_id for summary in await store.summaries()] == ["4", "3", "2"]


async def test_an_sqlite_file_outlives_its_store(tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path / 'sessions.db'}"
    first = open_store(where, TTL_S)
    await first.put(SESSION)
    await first.close()
    second = open_store(where, TTL_S)
    assert await second.get(SESSION.session_id) == SESSION
    await second.close()


async def test_two_stores_share_an_sqlite_file(tmp_path: Path) -> None:
    a, b = (SqliteStore(str(tmp_path / "s"), TTL_S) for _ in range(2))
    await a.link("k", "s")
    assert (await b.claim("k"), await a.claim("k")) == ("s", None)
    await a.close()
    await b.close()


async def test_a_file_that_is_no_database_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("no database at all, but long enough to have a header of its own" * 20)
    for path in (tmp_path / "s", tmp_path / "nowhere" / "s"):
        with pytest.raises(ConfigError, match=r"^sessions\.store: "):
            open_store(f"sqlite:///{path}", TTL_S)


async def test_an_sqlite_file_that_fails_is_unavailable(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "s"), TTL_S)
    with sqlite3.connect(tmp_path / "s") as other:
        other.execute("DROP TABLE sessions")
    with pytest.raises(Unavailable, match="does not answer"):
        await store.get("s")
    await store.close()


messages = st.builds(ChatMessage, st.text(), st.text(), st.none() | st.text())


@given(st.text(), st.lists(st.integers(0, 2**31 - 1)), st.lists(messages), st.none() | st.integers(0, 2**64 - 1))
def test_every_session_survives_its_json(name: str, ids: list[int], said: list[ChatMessage], seed: int | None) -> None:
    session = Session(name, tuple(ids), tuple(said), seed=seed)
    assert Session.from_json(session.to_json()) == session
