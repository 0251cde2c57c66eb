"""What the target replicas report about themselves: plain frozen data, ready to be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.sessions.history import SessionSummary

ReplicaStatus = Mapping[str, Any]
"""What one replica says about itself, ready for JSON. Only `paceline.api.metrics` reads it, and expects any of it to be
missing: a replica may be of another version."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session: where its KV cache is, and what is stored of its history.

    `cached_tokens` and `kv_bytes` are the KV's size at `replica_id`, `kv_tier` is where it lies there: on the device,
    in host memory or on disk. None, and no tokens, if no replica holds any.
    The other fields are None if no history is stored. Times are seconds since 1970.
    """

    session_id: str
    replica_id: str | None
    cached_tokens: int
    running: bool
    kv_bytes: int | None = None
    kv_tier: str | None = None
    history_tokens: int | None = None
    turns: int | None = None
    parent: str | None = None
    created: float | None = None
    updated: float | None = None

    def with_history(self, stored: SessionSummary | None) -> SessionInfo:
        if stored is None:
            return self
        return replace(
            self,
            history_tokens=stored.tokens,
            turns=stored.turns,
            parent=stored.parent,
            created=stored.created,
            updated=stored.updated,
        )


def with_histories(held: Sequence[SessionInfo], stored: Sequence[SessionSummary]) -> list[SessionInfo]:
    """Sessions whose KV is held, then those of which there is only the history."""
    held = _nearest(held)
    known = {summary.session_id: summary for summary in stored}
    nowhere = known.keys() - {info.session_id for info in held}
    found = [info.with_history(known.get(info.session_id)) for info in held]
    return found + [SessionInfo(name, None, 0, False).with_history(known[name]) for name in known if name in nowhere]


def _nearest(held: Sequence[SessionInfo]) -> list[SessionInfo]:
    """Without what a session has on disk if some replica has it at hand; else once: replicas may share a folder."""
    at_hand = [info for info in held if info.kv_tier != "disk"]
    seen = {info.session_id for info in at_hand}
    on_disk = {info.session_id: info for info in held if info.session_id not in seen}
    return sorted([*at_hand, *on_disk.values()], key=lambda info: info.session_id)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """One mapping for each target and each draft replica that answered.

    `routes` and `resumptions` count what the `router` that was asked has seen: accepted requests by the reason for
    their place, and replicas lost in the middle of an answer; `requests` those over HTTP by the template of their path
    and their status.
    """

    targets: tuple[ReplicaStatus, ...] = ()
    drafts: tuple[ReplicaStatus, ...] = ()
    routes: Mapping[str, int] = field(default_factory=dict)
    resumptions: int = 0
    requests: Mapping[tuple[str, str], int] = field(default_factory=dict)
    router: str = ""
    autoscaling: Mapping[str, Any] = field(default_factory=dict)
    """How many replicas of each pool are wanted, and what the autoscaler decided lately, as it writes it down."""
