"""Sessions change their replica and keep their KV: who takes which, and what is said about it.

    leaving replica     asks its peers for room, plans, announces, sends
    router              sends what follows on a session to its new holder, from the announcement on
    peer                knows what is to come: a request that is faster than its session's KV waits for it a moment

History is truth: what does not arrive is rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

BUSY = "being answered"
"""Why a session stays that is asked to move."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a replica could take: tokens of KV that are free, and of idle sessions, which can give way; `load` is its
    running and waiting requests."""

    replica: str
    free: int
    idle: int = 0
    load: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """Sessions that go to `holder`, within so many seconds; `sources` had them, or were to get them before."""

    sessions: tuple[str, ...]
    sources: tuple[str, ...]
    holder: str
    within_s: float


@dataclass(frozen=True, slots=True)
class Bound:
    """A call that is for one replica. Any other that gets it, because that one is gone, refuses."""

    replica: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a replica says to some parts: sessions that are whole now, sessions it cannot take, and those that a
    request waits for already."""

    arrived: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()


@dataclass(slots=True)
class HandoffCounts:
    """Of one replica since its start. `missing` sessions were announced to it and did not arrive; `seconds` were
    spent sending."""

    sent: int = 0
    received: int = 0
    failed: int = 0
    missing: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What became of the sessions of one hand-off: the new holders of those that arrived, with the tokens of their KV,
    and why others did not."""

    arrived: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def why(self) -> str:
        """The reasons of those left behind, with how many there are of each."""
        reasons = list(self.left.values())
        return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))


def plan(held: Mapping[str, int], rooms: Sequence[Room]) -> dict[str, str]:
    """Which replica takes which session; what fits nowhere is missing.

    `held` has tokens by session, those first that are wanted first. They spread evenly: each goes to the replica with
    the fewest requests and newly given sessions, among equals to the one with the most room. Of a peer's own idle
    sessions one part in n + 1 may give way, n being the peers: where every cache is full, as it is after a while, all
    sessions, those of the leaving replica and of its n peers, lose the same share.
    """
    left = {room.replica: room.free + room.idle // (len(rooms) + 1) for room in rooms}
    busy = {room.replica: room.load for room in rooms}
    holders: dict[str, str] = {}
    for session, tokens in held.items():
        fitting = [name for name in left if left[name] >= tokens]
        if not fitting:
            continue
        best = min(fitting, key=lambda name: (busy[name], -left[name], name))
        holders[session] = best
        left[best] -= tokens
        busy[best] += 1
    return holders


def by_holder(holders: Mapping[str, str]) -> dict[str, list[str]]:
    """The sessions each replica gets, in the order of the plan."""
    shares: dict[str, list[str]] = {}
    for session, holder in holders.items():
        shares.setdefault(holder, []).append(session)
    return shares


def wanted_first(sessions: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The same sessions, those first that a request waits for."""
    waited = set(wanted)
    return sorted(sessions, key=lambda session: session not in waited)
