"""From the setting to the store."""

from __future__ import annotations

from paceline.sessions.redis_store import RedisStore
from paceline.sessions.sqlite_store import SqliteStore
from paceline.sessions.store import MemoryStore, SessionStore

SQLITE = "sqlite:///"


def open_store(where: str, ttl_s: float) -> SessionStore:
    """`memory`, `sqlite:///path` (four slashes for an absolute one) or `redis://…`. Raises ConfigError."""
    if where == "memory":
        return MemoryStore(ttl_s)
    if where.startswith(SQLITE):
        return SqliteStore(where.removeprefix(SQLITE), ttl_s)
    return RedisStore.at(where, ttl_s)
