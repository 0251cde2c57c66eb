"""Which replica serves a request, as pure functions of what is known.

    the session's holder ── else the longest prefix ── else the least loaded        (each below its load bound)

The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): no replica takes
more than c times the mean. So a holder that is busy beyond it is passed over, and the session moves: a prefill, but
no queue.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
Mode = Literal["soft", "hard"]

ALWAYS_FREE = 4
"""A replica with fewer requests is not overloaded, however idle the others are: a batch has room."""
HOLDER_FREE = 8
"""The same of a session's holder: elsewhere the session costs a prefill, which takes longer than a batch of eight."""
PREFIX_SHARE = 0.5
"""A prefix decides only if it is that much of the prompt; else the rest is what costs."""


class Reason(StrEnum):
    """Why a request went where it went. The last four: why not elsewhere."""

    HOLDER = "holder"
    PREFIX = "prefix"
    LEAST_LOADED = "least_loaded"
    HOLDER_OVERLOADED = "holder_overloaded"
    HOLDER_GONE = "holder_gone"
    RESUMED = "resumed"
    FULL = "full"


@dataclass(slots=True)
class Route:
    """Travels with a request; whoever routes it writes down where it should go, and why."""

    replica: str = ""
    reason: str = ""

    def told_by(self, replica: str) -> str:
        """The reason, in the eyes of the replica that got the request: FULL if it was not the first choice."""
        return self.reason if replica == self.replica or not self.reason else Reason.FULL.value


@dataclass(frozen=True, slots=True)
class Wish:
    """What is known of one request: the session's holder, the tokens of its prompt that each replica holds, the
    replicas that failed it."""

    holder: str | None = None
    prefixes: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    avoid: Collection[str] = ()

    def prefix(self, replica: str) -> int:
        held = self.prefixes.get(replica, 0)
        return held if held >= PREFIX_SHARE * self.prompt_tokens else 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Replicas in the order to try, and why the first is first."""

    order: tuple[str, ...]
    reason: Reason


def place(wish: Wish, load: Mapping[str, int], *, mode: Mode = "soft", factor: float = 1.5, turn: int = 0) -> Placement:
    """Where a request goes. `load` has the running and waiting requests of every living replica.

    `factor` times the mean is the load bound. Among equals the order rotates with `turn`, so that a burst spreads
    out. Under "hard" a living holder is the only choice, however busy.
    """
    names = sorted(set(load) - set(wish.avoid)) or sorted(load)
    if not names:
        return Placement((), Reason.LEAST_LOADED)
    bound = load_bound(load, factor)
    rotated = {name: (position - turn) % len(names) for position, name in enumerate(names)}
    overloaded = {name for name in names if load[name] >= bound}

    def rank(name: str) -> tuple[bool, int, int, int]:
        prefix = 0 if name in overloaded else wish.prefix(name)
        return name in overloaded, -prefix, load[name], rotated[name]

    order = sorted(names, key=rank)
    holder = wish.holder if wish.holder in names else None
    if holder is not None and mode == "hard":
        return Placement((holder,), Reason.HOLDER)
    if holder is not None and load[holder] < max(bound, HOLDER_FREE):
        return Placement((holder, *(name for name in order if name != holder)), Reason.HOLDER)
    return Placement(tuple(order), _reason(wish, holder, order[0]))


def load_bound(load: Mapping[str, int], factor: float) -> int:
    """Requests from which on a replica counts as overloaded; at least one replica always has fewer."""
    mean = (sum(load.values()) + 1) / len(load)
    return max(ALWAYS_FREE, math.ceil(factor * mean))


def _reason(wish: Wish, holder: str | None, best: str) -> Reason:
    if wish.avoid:
        return Reason.RESUMED
    if holder is not None:
        return Reason.HOLDER_OVERLOADED
    if wish.holder is not None:
        return Reason.HOLDER_GONE
    return Reason.PREFIX if wish.prefix(best) else Reason.LEAST_LOADED


class Holders(Generic[K]):
    """Which replica holds what, as far as this process has seen; least recently used forgotten first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._replicas: OrderedDict[K, str] = OrderedDict()

    def get(self, key: K) -> str | None:
        return self._replicas.get(key)

    def put(self, key: K, replica: str) -> None:
        self._replicas[key] = replica
        self._replicas.move_to_end(key)
        if len(self._replicas) > self._limit:
            self._replicas.popitem(last=False)


class Ongoing:
    """The requests of this process at each replica: from when it was chosen, so that the next choice of a burst knows
    of this one, until they ended.

    The end may be heard before the acceptance. Ends of what was never accepted are soon forgotten.
    """

    EARLY = 1000

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._chosen: dict[str, str] = {}
        self._running: set[tuple[str, str]] = set()
        self._early: OrderedDict[tuple[str, str], None] = OrderedDict()

    def count(self, replica: str) -> int:
        return self._counts[replica]

    def choose(self, request: str, replica: str) -> None:
        """A request shall go there; instead of where it was to go before."""
        self.forget(request)
        self._chosen[request] = replica
        self._counts[replica] += 1

    def forget(self, request: str) -> None:
        """A choice that came to nothing."""
        if (replica := self._chosen.pop(request, None)) is not None:
            self._counts[replica] -= 1

    def begin(self, request: str, replica: str) -> None:
        """A replica accepted it."""
        self.forget(request)
        key = request, replica
        if key in self._early:
            del self._early[key]
        elif key not in self._running:
            self._running.add(key)
            self._counts[replica] += 1

    def end(self, request: str, replica: str) -> None:
        """It is over there, or was refused."""
        key = request, replica
        if key in self._running:
            self._running.remove(key)
            self._counts[replica] -= 1
            return
        if self._chosen.get(request) == replica:
            self.forget(request)
        self._early[key] = None
        if len(self._early) > self.EARLY:
            self._early.popitem(last=False)
