"""Which target replica serves a request: the session's holder if it can, else the least loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MAX_SESSIONS = 100_000


class Holders:
    """Which replica holds each session, as far as this process has seen; least recently used forgotten first."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._replicas: OrderedDict[str, str] = OrderedDict()

    def get(self, session_id: str) -> str | None:
        return self._replicas.get(session_id)

    def put(self, session_id: str, replica: str) -> None:
        self._replicas[session_id] = replica
        self._replicas.move_to_end(session_id)
        if len(self._replicas) > self._limit:
            self._replicas.popitem(last=False)

    def forget_all_but(self, replicas: Iterable[str]) -> None:
        """Drop the sessions of replicas that are gone."""
        alive = set(replicas)
        for session_id in [s for s, replica in self._replicas.items() if replica not in alive]:
            del self._replicas[session_id]


def rank(holder: str | None, load: Mapping[str, int], turn: int = 0) -> list[list[str]]:
    """Replicas in the order to try: the holder, then by load.

    Among equals the order rotates with `turn`, so that a burst of new sessions spreads out.
    """
    names = sorted(load)
    rotated = {name: (place - turn) % len(names) for place, name in enumerate(names)} if names else {}
    rest = sorted((name for name in names if name != holder), key=lambda name: (load[name], rotated[name]))
    return [[name] for name in ([holder] if holder is not None and holder in load else []) + rest]


class SessionRouter(RequestRouter):  # type: ignore[misc]  # Ray has no type information
    """Ray Serve's hook: one instance in every process that holds a handle to the targets.

    What it has not seen itself it takes from the replicas' routing stats, so that a restarted Router
    replica finds sessions again.
    """

    def initialize_state(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._holders = Holders(max_sessions)
        self._turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        # A full replica is asked again after a pause instead of at once.
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in by_name.items()}
        self._turn += 1
        holder = self._holder(pending_request.metadata.session_id, candidate_replicas)
        return [[by_name[name] for name in names] for names in rank(holder, load, self._turn)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, _result: Any) -> None:
        """The replica accepted the request: it holds the session from now on."""
        if session_id := pending_request.metadata.session_id:
            self._holders.put(session_id, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._holders.forget_all_but(replica.replica_id.unique_id for replica in replicas)

    def _holder(self, session_id: str | None, replicas: list[RunningReplica]) -> str | None:
        if not session_id:
            return None
        if (known := self._holders.get(session_id)) is not None:
            return known
        for replica in replicas:
            if session_id in (replica.routing_stats or {}).get("sessions", ()):
                return str(replica.replica_id.unique_id)
        return None
