"""Sessions in Redis, or what speaks its protocol: shared by the routers of any number of machines."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from paceline.errors import ConfigError, Unavailable
from paceline.sessions.history import Session, SessionSummary
from paceline.sessions.store import Clock, SessionStore

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

TIMEOUT_S = 2.0
PREFIX = "paceline"


class RedisStore(SessionStore):
    """A hash for each session, a list for each key, and a sorted set of sessions by their end, for the listing.

    Redis itself ends hashes and lists. `client` answers in bytes.
    """

    def __init__(self, client: Redis, ttl_s: float, clock: Clock = time.time) -> None:
        self._redis: Any = client
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._clock = clock

    @classmethod
    def at(cls, url: str, ttl_s: float, password: str | None = None) -> RedisStore:
        """`password` is for an address without one.

        Raises ConfigError if the library is missing, the address means nothing or the password is refused.
        """
        try:
            from redis.asyncio import Redis
        except ImportError:
            raise ConfigError(
                "sessions.store: Redis needs its client; install paceline[redis]", param="sessions.store"
            ) from None
        connection = {"password": password, "socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        try:
            client = Redis.from_url(url, **connection)
            _log_in(url, connection)
        except ValueError as error:
            raise ConfigError(f"sessions.store: {error}", param="sessions.store") from None
        return cls(client, ttl_s)

    async def get(self, session_id: str) -> Session | None:
        found = await self._ask(self._redis.hget(_session(session_id), "history"))
        return Session.from_json(found) if found is not None else None

    async def summary(self, session_id: str) -> SessionSummary | None:
        found = await self._ask(self._redis.hget(_session(session_id), "summary"))
        return SessionSummary.from_json(found) if found is not None else None

    async def put(self, session: Session) -> None:
        await self._keep(session)

    async def add(self, session: Session) -> bool:
        # The claim of a field is what decides between two that add at once.
        if not await self._ask(self._redis.hsetnx(_session(session.session_id), "summary", session.summary.to_json())):
            return False
        await self._keep(session)
        return True

    async def delete(self, session_id: str) -> bool:
        async with self._redis.pipeline() as pipe:
            pipe.delete(_session(session_id)).zrem(_index(), session_id)
            deleted, _ = await self._ask(pipe.execute())
        return bool(deleted)

    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        async with self._redis.pipeline() as pipe:
            pipe.zremrangebyscore(_index(), "-inf", self._clock() * 1000)
            pipe.zrange(_index(), 0, limit - 1, desc=True)
            _, names = await self._ask(pipe.execute())
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hget(_session(name.decode()), "summary")
            found = await self._ask(pipe.execute())
        return [SessionSummary.from_json(text) for text in found if text is not None]

    async def link(self, key: str, session_id: str) -> None:
        async with self._redis.pipeline() as pipe:
            pipe.rpush(_link(key), session_id).pexpire(_link(key), self._ttl_ms)
            await self._ask(pipe.execute())

    async def claim(self, key: str) -> str | None:
        found = await self._ask(self._redis.lpop(_link(key)))
        return found.decode() if found is not None else None

    async def close(self) -> None:
        await self._redis.aclose()

    async def _keep(self, session: Session) -> None:
        name, fields = (
            _session(session.session_id),
            {"summary": session.summary.to_json(), "history": session.to_json()},
        )
        async with self._redis.pipeline() as pipe:
            pipe.hset(name, mapping=fields).pexpire(name, self._ttl_ms)
            pipe.zadd(_index(), {session.session_id: self._clock() * 1000 + self._ttl_ms})
            await self._ask(pipe.execute())

    async def _ask(self, answer: Awaitable[T]) -> Any:
        from redis.exceptions import RedisError

        try:
            return await cast(Awaitable[Any], answer)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the session store does not answer; try again shortly") from error


def _log_in(url: str, connection: Mapping[str, Any]) -> None:
    """Raises ConfigError if a password is wrong or missing. A Redis that is away may come: that is no wrong setting."""
    from redis import Redis
    from redis.exceptions import AuthenticationError, RedisError

    client = Redis.from_url(url, **connection, retry=None)
    try:
        client.ping()
    except AuthenticationError:
        raise _refused(url, connection["password"]) from None
    except (RedisError, OSError):
        return
    finally:
        client.close()


def _refused(url: str, password: str | None) -> ConfigError:
    setting = "sessions.store" if password is None else "sessions.password_environment"
    if password is not None:
        why = "Redis refuses the password in that variable, or the user in sessions.store"
    elif urlsplit(url).password:
        why = "Redis refuses the user or the password in the address"
    else:
        why = "Redis wants a password; put it into a variable and name that in sessions.password_environment"
    return ConfigError(f"{setting}: {why}", param=setting)


def _session(session_id: str) -> str:
    return f"{PREFIX}:session:{session_id}"


def _link(key: str) -> str:
    return f"{PREFIX}:turn:{key}"


def _index() -> str:
    return f"{PREFIX}:sessions"
