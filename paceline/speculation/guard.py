"""What the model of costs misses: speculation is held to account against plain steps of the same load.

A drafter on the same cores, a slow wait, a curve that was measured on a quiet morning: none of it is in the
controller's model, all of it is in the time that passes. So each kind of source has an account in units of plain
steps. A step that speculated is charged what it took and credited what its tokens would have taken plainly; every
step, of whatever kind, adds ALLOWANCE. A kind whose account is overdrawn is suspended until the allowance has
paid for it and a little more; then it may try again. What speculation can lose is therefore ALLOWANCE of the
time for each kind, and CREDIT once, on any load; and what the controller forgives, ever more seldom: waits for drafts
that were accidents.

What a plain step takes is measured where plain steps occur, and where they do not, by a few of them now and then
(a check). A stretch of speculation is settled with the mean of what was measured before and after it, so that a
machine that slows down for everybody is not held against speculation.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from paceline.speculation.acceptance import Kind

ALLOWANCE = 0.01
"""Of the time, for each kind of source."""
CREDIT = 8.0
"""Most an account can hold, in plain steps."""
RETRY = 2.0
"""What a suspended kind must have to try again."""
DEBT = 100.0
"""Most an account can owe: one accident must not end speculation for the day."""
CHECK_STEPS = 3
FIRST_STRETCH = 32
UNCHECKED_STRETCH = 128
LONGEST_STRETCH = 512
CLEARLY = 0.8
"""Speculation that would not lose even if plain steps took only so much of what they are believed to is checked after
UNCHECKED_STRETCH steps at first, not after FIRST_STRETCH."""
SMOOTHING = 0.15
SURPRISE = 1.6


@dataclass(slots=True)
class _Account:
    credit: float = CREDIT
    suspended: bool = False

    def add(self, amount: float) -> None:
        self.credit = max(-DEBT, min(CREDIT, self.credit + amount))
        if self.suspended and self.credit >= RETRY:
            self.suspended = False


@dataclass(slots=True)
class _Load:
    """One range of batch sizes. `ratio` is what a plain step takes, over the curve; 0 while that is unknown.

    `seen` counts the plain steps ever, `samples` those since the last settlement.

    `took` and `worth` are a stretch's sums, by kind: what its steps took over the curve, and what plain steps
    for the same tokens take.
    """

    ratio: float = 0.0
    before: float = 0.0
    seen: int = 0
    samples: int = 0
    steps: int = 0
    longest: int = FIRST_STRETCH
    checking: bool = True
    took: dict[Kind, float] = field(default_factory=dict)
    worth: dict[Kind, float] = field(default_factory=dict)

    def loss(self, kind: Kind, ratio: float) -> float:
        """Of the stretch so far, in plain steps."""
        return self.took.get(kind, 0.0) / ratio - self.worth.get(kind, 0.0)


class Guard:
    """Accounts by kind of source, over loads by size."""

    def __init__(self) -> None:
        self._accounts = {kind: _Account() for kind in Kind}
        self._loads: dict[tuple[int, bool], _Load] = {}
        self._after_draft = False

    def allows(self, kind: Kind, windows: int, prefill: int) -> bool:
        """Whether a step of that many sequences may use that kind of source."""
        return not self._accounts[kind].suspended and not self._load(windows, prefill).checking

    def suspended(self, kind: Kind) -> bool:
        return self._accounts[kind].suspended

    def credit(self, kind: Kind) -> float:
        return self._accounts[kind].credit

    def plain_ratio(self, windows: int, prefill: int) -> float | None:
        """What a plain step of this load takes, over the curve; None while that is unknown."""
        return self._load(windows, prefill).ratio or None

    def note(
        self, windows: int, prefill: int, used: Collection[Kind], *, took: float, worth: float, unit: float
    ) -> None:
        """A step `took` seconds. By the curve a plain step of this load takes `unit`, and its tokens are `worth`."""
        load = self._load(windows, prefill)
        if not used:
            self._note_plain(load, took / unit)
        elif load.ratio:
            # A step that served both kinds is charged to the one that takes time.
            kind = Kind.DRAFT if Kind.DRAFT in used else Kind.LOOKUP
            load.took[kind] = load.took.get(kind, 0.0) + took / unit
            load.worth[kind] = load.worth.get(kind, 0.0) + worth / unit
            load.steps += 1
            lost = load.loss(kind, load.ratio)
            if lost > max(1.0, min(3.0, self._accounts[kind].credit)) or self._is_due(load):
                load.checking, load.samples = True, 0
        else:
            load.checking, load.samples = True, 0
        self._after_draft = Kind.DRAFT in used
        for account in self._accounts.values():
            account.add(ALLOWANCE * took / (unit * (load.ratio or 1.0)))

    def _is_due(self, load: _Load) -> bool:
        """Whether a stretch has gone on for long enough. One that would win on a faster machine too may go on."""
        if load.steps < load.longest:
            return False
        if load.longest < UNCHECKED_STRETCH and all(load.loss(kind, CLEARLY * load.ratio) < 0 for kind in load.took):
            load.longest *= 2
            return False
        return True

    def _load(self, windows: int, prefill: int) -> _Load:
        return self._loads.setdefault((windows.bit_length(), prefill > 0), _Load())

    def _note_plain(self, load: _Load, ratio: float) -> None:
        if self._after_draft:
            return  # the drafter may still be running ahead, on our cores
        if not load.seen:
            load.ratio = load.before = ratio
        load.seen += 1
        load.samples += 1
        ratio = min(max(ratio, load.ratio / SURPRISE), load.ratio * SURPRISE)
        load.ratio += max(SMOOTHING, 1 / load.seen) * (ratio - load.ratio)
        if load.samples >= CHECK_STEPS:
            self._settle(load)

    def _settle(self, load: _Load) -> None:
        """Book the stretch that ends here, and begin another."""
        between = (load.before + load.ratio) / 2
        lost = 0.0
        for kind in load.took:
            loss = load.loss(kind, between)
            account = self._accounts[kind]
            account.add(-loss)
            account.suspended = account.suspended or account.credit < 0
            lost += loss
        if load.steps:
            grown = 2 * load.longest if lost < -0.05 * load.steps else FIRST_STRETCH
            load.longest = min(grown, LONGEST_STRETCH)
        load.took.clear()
        load.worth.clear()
        load.before, load.samples, load.steps, load.checking = load.ratio, 0, 0, False
