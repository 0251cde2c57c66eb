"""Ray Serve's hook: `paceline.sessions.placement` decides, this knows the replicas."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from paceline.sessions.handoff import Bound, Move
from paceline.sessions.placement import Holders, Mode, Ongoing, Route, Wish, place
from paceline.sessions.prefixes import block_hashes, held_tokens, marks
from paceline.types import Request

T = TypeVar("T")

MAX_SESSIONS = 100_000
MAX_PREFIXES = 100_000


class SessionRouter(RequestRouter):  # type: ignore[misc]  # Ray has no type information
    """One instance in every process that holds a handle to the targets.

    What it has not seen itself it takes from the replicas' routing stats, so that a restarted Router
    replica finds sessions again.
    """

    def initialize_state(self, mode: Mode = "soft", load_bound: float = 1.5) -> None:
        self._mode: Mode = mode
        self._factor = load_bound
        self._sessions: Holders[str] = Holders(MAX_SESSIONS)
        self._prefixes: Holders[int] = Holders(MAX_PREFIXES)
        self._ongoing = Ongoing()
        self._told: dict[str, _Told] = {}
        # Several routers must not begin with the same replica.
        self._turn = secrets.randbelow(1 << 16)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        # A full replica is asked again after a pause instead of at once.
        pending_request.routing_context.should_backoff = True
        request_id, by_name = pending_request.metadata.internal_request_id, {}
        for replica in candidate_replicas:
            by_name[replica.replica_id.unique_id] = replica
        self._ongoing.forget(request_id)
        if (addressee := self._addressee(pending_request)) is not None:
            # A call for one replica. If that is gone any other gets it, and refuses: no choice at all would hang it.
            return [[by_name[addressee]] if addressee in by_name else candidate_replicas]
        self._turn += 1
        placement = place(
            self._wish(pending_request, by_name),
            {name: self._load(replica.replica_id) for name, replica in by_name.items()},
            mode=self._mode,
            factor=self._factor,
            turn=self._turn,
        )
        best = placement.order[0]
        self._ongoing.choose(request_id, best)
        pending_request.future.add_done_callback(partial(self._ended_unrouted, request_id))
        if (route := _argument(pending_request, Route)) is not None:
            route.replica, route.reason = best, placement.reason.value
        return [[by_name[name]] for name in placement.order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, _result: Any) -> None:
        """The replica accepted the request: it holds the session and the prompt from now on."""
        name = replica_id.unique_id
        self._ongoing.begin(pending_request.metadata.internal_request_id, name)
        if session_id := pending_request.metadata.session_id:
            self._sessions.put(session_id, name)
        if (request := _argument(pending_request, Request)) is not None:
            hashes = block_hashes(request.token_ids)
            for number in marks(len(hashes)):
                self._prefixes.put(hashes[number - 1], name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._ongoing.end(internal_request_id, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._told = {
            replica.replica_id.unique_id: _Told.of(replica, self._told.get(replica.replica_id.unique_id))
            for replica in replicas
        }

    def _addressee(self, pending: PendingRequest) -> str | None:
        """The replica a call is for, if it is about a hand-off. Where sessions go is noted in passing."""
        if (move := _argument(pending, Move)) is not None:
            for session in move.sessions:
                if self._sessions.get(session) in (None, *move.sources):
                    self._sessions.put(session, move.holder)
            return move.holder
        bound = _argument(pending, Bound)
        return bound.replica if bound is not None else None

    def _ended_unrouted(self, request_id: str, future: asyncio.Future[Any]) -> None:
        """Nobody waits for this request any more."""
        if future.cancelled():
            self._ongoing.forget(request_id)

    def _load(self, replica_id: ReplicaID) -> int:
        """Serve's count has the requests of other routers too, and is forgotten after ten seconds."""
        return max(self.replica_queue_len_cache.get(replica_id) or 0, self._ongoing.count(replica_id.unique_id))

    def _wish(self, pending: PendingRequest, alive: dict[str, RunningReplica]) -> Wish:
        holder = self._holder(pending.metadata.session_id, alive)
        request = _argument(pending, Request)
        if request is None:
            return Wish(holder)
        return Wish(holder, self._held(request.token_ids, alive), len(request.token_ids), request.avoid)

    def _holder(self, session_id: str | None, alive: dict[str, RunningReplica]) -> str | None:
        """Who was seen to take the session last; if that replica is gone, who says it has it."""
        if not session_id:
            return None
        known = self._sessions.get(session_id)
        if known in alive:
            return known
        return next((name for name, told in self._told.items() if session_id in told.sessions), known)

    def _held(self, token_ids: Sequence[int], alive: dict[str, RunningReplica]) -> dict[str, int]:
        """Tokens of the prompt that each replica holds, told by itself or seen here."""
        hashes = block_hashes(token_ids)
        seen: dict[str, set[int]] = {}
        for each in hashes:
            if (name := self._prefixes.get(each)) is not None:
                seen.setdefault(name, set()).add(each)
        nothing = _Told()
        return {
            name: max(
                held_tokens(hashes, self._told.get(name, nothing).prefixes), held_tokens(hashes, seen.get(name, ()))
            )
            for name in alive
        }


class _Told:
    """What one replica says of itself in its routing stats, made quick to ask."""

    def __init__(self, stats: dict[str, Any] | None = None) -> None:
        self.stats = stats or {}
        self.sessions = frozenset(self.stats.get("sessions", ()))
        self.prefixes = frozenset(self.stats.get("prefixes", ()))

    @classmethod
    def of(cls, replica: RunningReplica, before: _Told | None) -> _Told:
        stats = replica.routing_stats or {}
        return before if before is not None and before.stats == stats else cls(stats)


def _argument(pending: PendingRequest, kind: type[T]) -> T | None:
    """The call's argument of a type. Other calls than `generate` have none of ours."""
    return next((each for each in pending.args if isinstance(each, kind)), None)
