"""Where histories are kept: in memory, or where they survive the process and are shared by several routers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from paceline.sessions.history import Session, SessionSummary

Clock = Callable[[], float]


class SessionStore(ABC):
    """Sessions by id, and keys that lead to one. Everything ends `ttl_s` seconds after it was last put.

    What a backend fails with, it raises as `Unavailable`.
    """

    @abstractmethod
    async def get(self, session_id: str) -> Session | None:
        """A session, if it is there and has not ended."""

    @abstractmethod
    async def summary(self, session_id: str) -> SessionSummary | None:
        """The same without its history."""

    @abstractmethod
    async def put(self, session: Session) -> None:
        """Keep a session, in place of what was under its id."""

    @abstractmethod
    async def add(self, session: Session) -> bool:
        """Keep a session unless there is one under its id. Whether it was kept."""

    @abstractmethod
    async def delete(self, session_id: str) -> bool:
        """Whether there was one."""

    @abstractmethod
    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        """The sessions put last, the latest first."""

    @abstractmethod
    async def link(self, key: str, session_id: str) -> None:
        """Let a key lead to a session, after those it leads to already."""

    @abstractmethod
    async def claim(self, key: str) -> str | None:
        """The session a key leads to, the first linked of several; it leads there no more."""

    @abstractmethod
    async def close(self) -> None:
        """Release what is held."""


@dataclass(frozen=True, slots=True)
class _Kept:
    summary: SessionSummary
    history: str
    ends: float


class MemoryStore(SessionStore):
    """The sessions of one process. Beyond `limit` the one put longest ago goes."""

    def __init__(self, ttl_s: float, limit: int = 10_000, clock: Clock = time.time) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._links: OrderedDict[str, list[tuple[str, float]]] = OrderedDict()

    async def get(self, session_id: str) -> Session | None:
        kept = self._living(session_id)
        return Session.from_json(kept.history) if kept is not None else None

    async def summary(self, session_id: str) -> SessionSummary | None:
        kept = self._living(session_id)
        return kept.summary if kept is not None else None

    async def put(self, session: Session) -> None:
        self._kept[session.session_id] = _Kept(session.summary, session.to_json(), self._clock() + self._ttl_s)
        self._kept.move_to_end(session.session_id)
        self._drop_ended()

    async def add(self, session: Session) -> bool:
        if self._living(session.session_id) is not None:
            return False
        await self.put(session)
        return True

    async def delete(self, session_id: str) -> bool:
        living = self._living(session_id) is not None
        self._kept.pop(session_id, None)
        return living

    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        self._drop_ended()
        return [kept.summary for kept in reversed(self._kept.values())][:limit]

    async def link(self, key: str, session_id: str) -> None:
        self._links.setdefault(key, []).append((session_id, self._clock() + self._ttl_s))
        self._links.move_to_end(key)
        if len(self._links) > self._limit:
            self._links.popitem(last=False)

    async def claim(self, key: str) -> str | None:
        found = [(name, ends) for name, ends in self._links.pop(key, ()) if ends > self._clock()]
        if len(found) > 1:
            self._links[key] = found[1:]
        return found[0][0] if found else None

    async def close(self) -> None:
        pass

    def _living(self, session_id: str) -> _Kept | None:
        kept = self._kept.get(session_id)
        return kept if kept is not None and kept.ends > self._clock() else None

    def _drop_ended(self) -> None:
        """Put longest ago is ended first."""
        while self._kept and (len(self._kept) > self._limit or next(iter(self._kept.values())).ends <= self._clock()):
            self._kept.popitem(last=False)
