"""From the setting to the store."""

from __future__ import annotations

from paceline.config import secret
from paceline.errors import ConfigError
from paceline.sessions.redis_store import RedisStore
from paceline.sessions.sqlite_store import SqliteStore
from paceline.sessions.store import MemoryStore, SessionStore

SQLITE = "sqlite:///"


def open_store(where: str, ttl_s: float, password_environment: str | None = None) -> SessionStore:
    """`memory`, `sqlite:///path` (four slashes for an absolute one) or `redis://…`, with its password in a variable.

    Asks a Redis that is there whether it takes the password. Raises ConfigError.
    """
    if where == "memory":
        return MemoryStore(ttl_s)
    if where.startswith(SQLITE):
        return SqliteStore(where.removeprefix(SQLITE), ttl_s)
    password = None
    if password_environment is not None and (password := secret(password_environment)) is None:
        raise ConfigError(
            f"sessions.password_environment: {password_environment} is not set", param="sessions.password_environment"
        )
    return RedisStore.at(where, ttl_s, password)
