"""What the target replicas report about themselves: plain frozen data, ready to be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ReplicaStatus = Mapping[str, Any]
"""What one replica says about itself, ready for JSON. Only `paceline.api.metrics` reads it, and expects any of it to be
missing: a replica may be of another version."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session whose KV cache a target replica holds. `cached_tokens` counts the tokens it covers."""

    session_id: str
    replica_id: str
    cached_tokens: int
    running: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """One mapping for each target and each draft replica that answered.

    `routes` and `resumptions` count what the router that was asked has seen: accepted requests by the reason for
    their place, and replicas lost in the middle of an answer.
    """

    targets: tuple[ReplicaStatus, ...] = ()
    drafts: tuple[ReplicaStatus, ...] = ()
    routes: Mapping[str, int] = field(default_factory=dict)
    resumptions: int = 0
