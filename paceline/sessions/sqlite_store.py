"""Sessions in an SQLite file: they survive a restart, and several routers of one machine share them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from paceline.errors import ConfigError, Unavailable
from paceline.sessions.history import Session, SessionSummary
from paceline.sessions.store import Clock, SessionStore

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
SCHEMA = """
    CREATE TABLE IF NOT EXISTS sessions (
        session_id TEXT PRIMARY KEY, summary TEXT NOT NULL, history TEXT NOT NULL, ends REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS sessions_by_end ON sessions (ends);
    CREATE TABLE IF NOT EXISTS links (
        place INTEGER PRIMARY KEY, key TEXT NOT NULL, session_id TEXT NOT NULL, ends REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS links_by_key ON links (key);
    CREATE INDEX IF NOT EXISTS links_by_end ON links (ends);
"""


class SqliteStore(SessionStore):
    """One connection in a thread of its own, so that a disk that is slow stops no stream."""

    def __init__(self, path: str, ttl_s: float, clock: Clock = time.time) -> None:
        """Raises ConfigError if the file cannot be opened as a database."""
        self._ttl_s = ttl_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sessions")
        try:
            self._database = self._thread.submit(_open, path).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise ConfigError(f"sessions.store: {path}: {error}", param="sessions.store") from None

    async def get(self, session_id: str) -> Session | None:
        found = await self._one("SELECT history FROM sessions WHERE session_id = ? AND ends > ?", session_id)
        return Session.from_json(found) if found is not None else None

    async def summary(self, session_id: str) -> SessionSummary | None:
        found = await self._one("SELECT summary FROM sessions WHERE session_id = ? AND ends > ?", session_id)
        return SessionSummary.from_json(found) if found is not None else None

    async def put(self, session: Session) -> None:
        await self._keep(session, "INSERT OR REPLACE")

    async def add(self, session: Session) -> bool:
        return await self._keep(session, "INSERT OR IGNORE")

    async def delete(self, session_id: str) -> bool:
        query = "DELETE FROM sessions WHERE session_id = ? AND ends > ? RETURNING session_id"
        return await self._one(query, session_id) is not None

    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        query, now = "SELECT summary FROM sessions WHERE ends > ? ORDER BY ends DESC LIMIT ?", self._clock()
        rows = await self._run(lambda: self._database.execute(query, (now, limit)).fetchall())
        return [SessionSummary.from_json(text) for (text,) in rows]

    async def link(self, key: str, session_id: str) -> None:
        row = key, session_id, self._clock() + self._ttl_s
        query = "INSERT INTO links (key, session_id, ends) VALUES (?, ?, ?)"
        await self._run(lambda: self._database.execute(query, row))

    async def claim(self, key: str) -> str | None:
        first = "SELECT min(place) FROM links WHERE key = ? AND ends > ?"
        return await self._one(f"DELETE FROM links WHERE place = ({first}) RETURNING session_id", key)

    async def close(self) -> None:
        await self._run(self._database.close)
        self._thread.shutdown()

    async def _one(self, query: str, key: str) -> str | None:
        """The first column of the one row that a query of a key and the time finds."""
        values = key, self._clock()
        row = await self._run(lambda: self._database.execute(query, values).fetchone())
        return str(row[0]) if row is not None else None

    async def _keep(self, session: Session, how: str) -> bool:
        now = self._clock()
        row = session.session_id, session.summary.to_json(), session.to_json(), now + self._ttl_s

        def keep() -> bool:
            for table in ("sessions", "links"):
                self._database.execute(f"DELETE FROM {table} WHERE ends <= ?", (now,))
            return self._database.execute(f"{how} INTO sessions VALUES (?, ?, ?, ?)", row).rowcount > 0

        return await self._run(keep)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise Unavailable("the session store does not answer; try again shortly") from error


def _open(path: str) -> sqlite3.Connection:
    """Every statement is a transaction of its own; readers and a writer of other processes do not wait for another."""
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(SCHEMA)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.close()
        raise
    return database
