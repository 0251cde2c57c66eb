"""What a key sees: its own sessions, under the names it gave them, and no word of others.

Inside, a session `s` of the key `alice` is `~alice/s`: at the replicas, in the store, for routing. A key with `admin`
sees all of them by those names, and its own are those without an owner, as are those of a server without keys.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NoReturn, cast

from paceline.api.gateway import Gateway, Targets
from paceline.api.keys import Caller
from paceline.api.nodes import Machines, Nodes
from paceline.api.state import ClusterStatus, SessionInfo
from paceline.errors import Forbidden
from paceline.sessions.handoff import Outcome
from paceline.sessions.history import Session, SessionSummary
from paceline.sessions.store import SessionStore
from paceline.types import Accepted, Delta, Frame, Request

MAX_LOOKED_THROUGH = 10_000
"""Of the sessions used last, all keys together: those a key finds its own among."""


def seen_by(gateway: Gateway, caller: Caller | None) -> Gateway:
    """The gateway as the holder of a key may use it; of None, where nobody needs a key, as it is."""
    if caller is None:
        return gateway
    names = Names(caller)
    return gateway.scoped(
        names.prefix,
        lambda targets: OwnedTargets(targets, caller),
        lambda store: OwnedStore(store, names),
        lambda nodes: nodes if caller.admin else HiddenNodes(),
    )


class Names:
    """Of one key's sessions, here and inside."""

    def __init__(self, caller: Caller) -> None:
        self.prefix = "" if caller.admin else f"~{caller.name}/"

    def inside(self, session_id: str) -> str:
        return self.prefix + session_id

    def mine(self, inside: str) -> bool:
        return inside.startswith(self.prefix)

    def outside(self, inside: str) -> str:
        return inside.removeprefix(self.prefix)


class OwnedTargets(Targets):
    """The replicas, for one key: charged for its tokens, kept to its sessions. Only `admin` may ask for more."""

    def __init__(self, targets: Targets, caller: Caller) -> None:
        self._targets = targets
        self._caller = caller
        self._names = Names(caller)

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        quota = self._caller.quota
        if not request.resumed:
            quota.check_tokens()
        if request.session_id is not None:
            request = replace(request, session_id=self._names.inside(request.session_id))
        async with aclosing(cast(AsyncGenerator[Frame, None], self._targets.generate(request))) as frames:
            async for frame in frames:
                if isinstance(frame, Delta):
                    quota.charge(len(frame.token_ids))
                elif isinstance(frame, Accepted) and not request.resumed:
                    quota.charge(len(request.token_ids))
                yield frame

    async def sessions(self) -> list[SessionInfo]:
        held = await self._targets.sessions()
        names = self._names
        return [
            replace(each, session_id=names.outside(each.session_id)) for each in held if names.mine(each.session_id)
        ]

    async def close_session(self, session_id: str) -> bool:
        return await self._targets.close_session(self._names.inside(session_id))

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        return await self._admin().hand_off(replica, sessions, count, to)

    async def abort(self, request_id: str) -> bool:
        """Whoever knows an id: nobody but the one who sent the request is told it."""
        return await self._targets.abort(request_id)

    async def status(self) -> ClusterStatus:
        return await self._admin().status()

    def _admin(self) -> Targets:
        if not self._caller.admin:
            _refuse()
        return self._targets


class HiddenNodes(Nodes):
    """The nodes, for a key without `admin`."""

    @property
    def target_needs(self) -> Mapping[str, float]:
        _refuse()

    @property
    def leaving_s(self) -> float:
        _refuse()

    @property
    def histories_stay(self) -> bool:
        _refuse()

    async def look(self) -> Machines:
        _refuse()

    async def drain(self, node_id: str, deadline: float) -> None:  # noqa: ARG002  # it is refused
        _refuse()


class OwnedStore(SessionStore):
    """The part of a store that is one key's."""

    def __init__(self, store: SessionStore, names: Names) -> None:
        self._store = store
        self._names = names

    async def get(self, session_id: str) -> Session | None:
        found = await self._store.get(self._names.inside(session_id))
        return None if found is None else replace(found, session_id=session_id)

    async def summary(self, session_id: str) -> SessionSummary | None:
        found = await self._store.summary(self._names.inside(session_id))
        return None if found is None else replace(found, session_id=session_id)

    async def put(self, session: Session) -> None:
        await self._store.put(self._named(session))

    async def add(self, session: Session) -> bool:
        return await self._store.add(self._named(session))

    async def delete(self, session_id: str) -> bool:
        return await self._store.delete(self._names.inside(session_id))

    async def summaries(self, limit: int = 1000) -> list[SessionSummary]:
        latest = await self._store.summaries(max(limit, MAX_LOOKED_THROUGH))
        mine = [each for each in latest if self._names.mine(each.session_id)][:limit]
        return [replace(each, session_id=self._names.outside(each.session_id)) for each in mine]

    async def link(self, key: str, session_id: str) -> None:
        await self._store.link(self._names.inside(key), self._names.inside(session_id))

    async def claim(self, key: str) -> str | None:
        found = await self._store.claim(self._names.inside(key))
        return None if found is None else self._names.outside(found)

    async def close(self) -> None:
        """The store is everybody's, and is closed by whoever opened it."""

    def _named(self, session: Session) -> Session:
        return replace(session, session_id=self._names.inside(session.session_id))


def _refuse() -> NoReturn:
    raise Forbidden("this needs an API key with `admin`")
