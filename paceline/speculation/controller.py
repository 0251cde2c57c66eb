"""How many candidates each sequence gets in a step, and from whom: expected tokens a second are maximized.

All running sequences share one forward pass, so they are decided on together. A candidate at the end of a run is
worth the probability that the whole run is accepted. Sorted by that worth over all sequences, any prefix of the
list is a possible step, since within a run worth only falls; and no other set of as many candidates is worth more.
So it is enough to walk along the list and keep the prefix with the most tokens a second,

    (sequences + sum of worth) / (cost of that many rows + wait for a draft of that depth),

once for every depth a draft may be asked for (Leviathan et al. 2211.17192 have the single sequence; TurboSpec
2406.14066 maximizes goodput over a batch). The cost of rows has steps, so the walk does not stop at the first loss.

Beside prompts a step costs more, but not because of its candidates: they are then worth the time they save later,
at the rate of a step without prompts.

Pure: no clock, no input or output. What is measured comes in with `note`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

from paceline.speculation.acceptance import MAX_DEPTH, Acceptance, Kind
from paceline.speculation.cost import VerifyCost
from paceline.speculation.gain import DraftGain
from paceline.speculation.guard import CREDIT, Guard

LEAST_WORTH = 0.02
"""Candidates less likely than this are not considered."""
MARGIN = 0.03
"""By how much a step with candidates must promise to be better than one without."""
PROBE_SHARE = 0.003
"""Of the time, at most, for asking drafts that are not worth it, to see whether they got better."""
SHORTEST_PAUSE, LONGEST_PAUSE = 8, 8192
"""Steps between two such probes."""
ACCIDENT = 2.0
"""Plain steps that a step waits for drafts in an accident: a kernel that loads at its first use, a stalled process."""
SURPRISE = 2.0
"""A forward pass that takes more than this times what was expected is not held against anyone."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one kind of source has for one sequence, or may be asked for: up to `count` candidates.

    `matched` is the length of the match behind prompt lookup's.
    """

    kind: Kind
    count: int
    matched: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Take `depth` candidates from a kind of source."""

    kind: Kind
    depth: int


@dataclass(frozen=True, slots=True)
class Spent:
    """A step, measured: `drawn` rows of `windows` sequences gave `tokens`, beside `prefill` prompt tokens.

    `forward_s` is the pass and its sampling, `other_s` the waiting for drafts and the speculator's own work.
    """

    windows: int
    drawn: int
    prefill: int
    tokens: int
    forward_s: float
    other_s: float
    used: frozenset[Kind] = frozenset()
    """Kinds of source at work: a draft that was asked, whatever came of it; prompt lookup whose candidates went in."""
    draft_rows: int = 0
    """Of the rows drawn, those of drafts' candidates."""
    added: int = 0
    """Of the tokens, those that are there because of drafts alone: prompt lookup had not said them too."""


Offers = Mapping[int, Sequence[Offer]]
"""By sequence, of every sequence that decodes in the step, also of those for which there is no offer."""


class Policy(ABC):
    """Decides on sources and depths: once when a step is over and drafts can be asked, and again when they answered.

    `cost` is what it knows of a pass by its rows, `gain` what drafts have brought; None of one that knows nothing.
    """

    cost: VerifyCost | None = None
    gain: DraftGain | None = None

    @abstractmethod
    def ask(self, offers: Offers, prefill: int, wait: Callable[[int], float]) -> dict[int, int]:
        """Depths to ask of the drafts for the next step, which will have some `prefill` prompt tokens beside it.

        `wait` gives the seconds a step waits for drafts of a depth.
        """

    @abstractmethod
    def take(self, offers: Offers, prefill: int) -> dict[int, Choice]:
        """A choice for each sequence that is to have candidates, out of what is there."""

    @abstractmethod
    def note_run(self, sequence: int, kind: Kind, matched: int, hits: int, missed: bool) -> None:
        """`hits` candidates stood, or would have; `missed` says that the next one did not."""

    @abstractmethod
    def note_step(self, spent: Spent) -> None:
        """A step is over."""

    @abstractmethod
    def close(self, sequence: int) -> None:
        """A sequence ended."""

    @abstractmethod
    def rests(self, kind: Kind) -> bool:
        """Whether that kind of source will not be used for a while, whatever it has."""


class FixedDepth(Policy):
    """A number of candidates, whatever they are worth: a draft's if there are any, else prompt lookup's.

    Nor does it count what drafts bring: it has no plain steps to hold them against, and nobody who sets a depth wants
    it undone by sending the drafters away.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def ask(self, offers: Offers, prefill: int, wait: Callable[[int], float]) -> dict[int, int]:  # noqa: ARG002
        drafts = ((sequence, _of_kind(each, Kind.DRAFT)) for sequence, each in offers.items())
        return {sequence: min(self._depth, offer.count) for sequence, offer in drafts if offer is not None}

    def take(self, offers: Offers, prefill: int) -> dict[int, Choice]:  # noqa: ARG002
        found = {}
        for sequence, each in offers.items():
            offer = _of_kind(each, Kind.DRAFT) or _of_kind(each, Kind.LOOKUP)
            if offer is not None:
                found[sequence] = Choice(offer.kind, min(self._depth, offer.count))
        return found

    def note_run(self, sequence: int, kind: Kind, matched: int, hits: int, missed: bool) -> None:
        """Nothing is learnt."""

    def note_step(self, spent: Spent) -> None:
        """Nothing is learnt."""

    def close(self, sequence: int) -> None:
        """Nothing is kept."""

    def rests(self, kind: Kind) -> bool:  # noqa: ARG002
        return False


class Controller(Policy):
    """The adaptive depth."""

    def __init__(self, cost: VerifyCost) -> None:
        self.cost: VerifyCost = cost
        self.gain: DraftGain = DraftGain()
        self._acceptance = Acceptance()
        self._guard = Guard()
        self._idle = self._probes = 0
        self._probed: int | None = None
        self._asked: tuple[int, int, frozenset[int]] | None = None
        self._with_drafts = self._accidents = 0

    def ask(self, offers: Offers, prefill: int, wait: Callable[[int], float]) -> dict[int, int]:
        self._probed = self._asked = None
        if not self._allowed(Kind.DRAFT, offers, prefill):
            return {}
        runs = self._runs(offers, prefill)
        best_of = self._weigh(len(offers), runs, prefill)
        depth, best = 0, best_of(0, 0.0)
        for deeper in range(1, runs.deepest + 1):
            found = best_of(deeper, wait(deeper))
            if found.score > best.score:
                depth, best = deeper, found
        choices = runs.choices(depth, best.count)
        depths = {sequence: choice.depth for sequence, choice in choices.items() if choice.kind is Kind.DRAFT}
        if depths:
            self._idle = 0
            self._asked = len(offers), prefill, frozenset(depths)
            return depths
        return self._probe(offers, wait(1))

    def take(self, offers: Offers, prefill: int) -> dict[int, Choice]:
        drafts = {sequence: each[0] for sequence, each in offers.items() if each}
        only_drafts = all(each.kind is Kind.DRAFT for each in drafts.values())
        if only_drafts and self._asked == (len(offers), prefill, frozenset(drafts)):
            # Nothing has changed since they were asked for, and the wait for them is over.
            return {sequence: Choice(Kind.DRAFT, each.count) for sequence, each in drafts.items()}
        runs = self._runs(offers, prefill)
        choices = runs.choices(MAX_DEPTH, self._weigh(len(offers), runs, prefill)(MAX_DEPTH, 0.0).count)
        if self._probed is not None and _of_kind(offers.get(self._probed, ()), Kind.DRAFT) is not None:
            choices.setdefault(self._probed, Choice(Kind.DRAFT, 1))
        return choices

    def note_run(self, sequence: int, kind: Kind, matched: int, hits: int, missed: bool) -> None:
        self._acceptance.note(sequence, kind, matched, hits, missed)

    def note_step(self, spent: Spent) -> None:
        cost, windows = self.cost, spent.windows
        expected = cost.seconds(spent.drawn, windows, spent.prefill)
        unit, decode = cost.curve(windows + spent.prefill, windows), cost.curve(windows, windows)
        forward_s, other_s = min(spent.forward_s, SURPRISE * expected), spent.other_s
        if Kind.DRAFT in spent.used:
            self._note_gain(spent, forward_s + other_s)
            other_s = self._forgiving(other_s, unit)
        cost.observe(spent.drawn, windows, spent.prefill, spent.forward_s)
        self._guard.note(
            windows,
            spent.prefill,
            spent.used,
            took=forward_s + other_s,
            worth=unit + (spent.tokens - windows) / windows * decode,
            unit=unit,
        )

    def close(self, sequence: int) -> None:
        self._acceptance.close(sequence)

    def rests(self, kind: Kind) -> bool:
        return self._guard.suspended(kind)

    def _note_gain(self, spent: Spent, took: float) -> None:
        """Held against the same step without drafts, which has prompt lookup's candidates all the same. Nothing is
        forgiven here."""
        windows, prefill = spent.windows, spent.prefill
        lookup_s = self.cost.seconds(spent.drawn - spent.draft_rows, windows, prefill)
        lookup_s -= self.cost.seconds(windows, windows, prefill)
        without = self._plain_s(windows, prefill) + lookup_s
        decode = self._plain_s(windows, 0) + lookup_s
        self.gain.note(took=took, without=without, tokens=spent.tokens, added=spent.added, decode=decode)

    def _plain_s(self, windows: int, prefill: int) -> float:
        """A step without candidates: as plain steps were measured, else by the curve and what steps have taught."""
        ratio = self._guard.plain_ratio(windows, prefill)
        if ratio is None:
            return self.cost.seconds(windows, windows, prefill)
        return ratio * self.cost.curve(windows + prefill, windows)

    def _forgiving(self, waited_s: float, unit: float) -> float:
        """A wait for drafts as it is charged. One accident must not end speculation for minutes: the n-th is forgiven
        once 2^n steps with drafts are over, so that in the long run nothing is."""
        self._with_drafts += 1
        if waited_s <= ACCIDENT * unit or self._with_drafts < 1 << self._accidents:
            return waited_s
        self._accidents += 1
        return unit

    def _allowed(self, kind: Kind, offers: Offers, prefill: int) -> bool:
        return bool(offers) and self._guard.allows(kind, len(offers), prefill)

    def _runs(self, offers: Offers, prefill: int) -> _Runs:
        """Of each sequence with offers that are allowed now: what each candidate is worth."""
        allowed = [kind for kind in Kind if self._allowed(kind, offers, prefill)]
        found: dict[int, dict[Kind, list[float]]] = {}
        for sequence, each in offers.items():
            for offer in each:
                if offer.kind in allowed:
                    run = self._acceptance.run(sequence, offer.kind, offer.matched, offer.count, LEAST_WORTH)
                    found.setdefault(sequence, {})[offer.kind] = run
        return _Runs(found)

    def _weigh(self, windows: int, runs: _Runs, prefill: int) -> Callable[[int, float], _Best]:
        """Finds the best step for a depth of drafts and the wait it takes."""
        if not runs.most:
            return lambda _, __: _Best(0, 0.0, 0.0)
        costs = self.cost.upwards(windows, runs.most)
        if not prefill:
            return lambda depth, waited: _best(windows, runs.worths(depth), costs, waited)
        # At what rate tokens come when the prompts are done.
        rate = _best(windows, runs.worths(MAX_DEPTH), costs, 0.0).rate
        mixed = self.cost.upwards(windows, runs.most, prefill)
        return lambda depth, waited: _best(windows, runs.worths(depth), mixed, waited, rate)

    def _probe(self, offers: Offers, wait_s: float) -> dict[int, int]:
        """Now and then one sequence asks for one candidate: as often as its expected loss allows."""
        drafted = [sequence for sequence, each in offers.items() if _of_kind(each, Kind.DRAFT) is not None]
        self._idle += 1
        if not drafted or self._idle < SHORTEST_PAUSE or self._guard.credit(Kind.DRAFT) < CREDIT / 2:
            return {}
        windows, sequence = len(offers), drafted[self._probes % len(drafted)]
        (worth,) = self._acceptance.run(sequence, Kind.DRAFT, 0, 1)
        seconds = self.cost.seconds(windows + 1, windows) + wait_s
        loss = seconds / self.cost.seconds(windows, windows) * windows / (windows + worth) - 1.0
        if self._idle < min(LONGEST_PAUSE, loss / PROBE_SHARE):
            return {}
        self._probed = sequence
        self._probes += 1
        self._idle = 0
        return {sequence: 1}


class _Runs:
    """What candidates are worth: of each sequence its draft's and its lookup's, each run falling."""

    def __init__(self, runs: Mapping[int, Mapping[Kind, list[float]]]) -> None:
        self._runs = [
            (sequence, draft, list(accumulate(draft, initial=0.0)), lookup, sum(lookup))
            for sequence, each in runs.items()
            for draft, lookup in [(each.get(Kind.DRAFT, []), each.get(Kind.LOOKUP, []))]
        ]
        self.deepest = max((len(draft) for _, draft, *_ in self._runs), default=0)
        self.most = sum(max(len(draft), len(lookup)) for _, draft, _, lookup, _ in self._runs)

    def worths(self, depth: int) -> list[float]:
        """Of all candidates, the best first, if each sequence has its better source and drafts are that deep."""
        found: list[float] = []
        for _, draft, sums, lookup, total in self._runs:
            found += draft[:depth] if sums[min(depth, len(draft))] > total else lookup
        found.sort(reverse=True)
        return found

    def choices(self, depth: int, count: int) -> dict[int, Choice]:
        """Those that the best `count` of them make."""
        ranked = []
        for sequence, draft, sums, lookup, total in self._runs:
            better = sums[min(depth, len(draft))] > total
            kind, run = (Kind.DRAFT, draft[:depth]) if better else (Kind.LOOKUP, lookup)
            ranked += [(worth, sequence, kind) for worth in run]
        ranked.sort(key=itemgetter(0), reverse=True)
        depths = Counter((sequence, kind) for _, sequence, kind in ranked[:count])
        return {sequence: Choice(kind, depth) for (sequence, kind), depth in depths.items()}


@dataclass(frozen=True, slots=True)
class _Best:
    """The best step: how many candidates it has, its tokens a second, and how good that is."""

    count: int
    rate: float
    score: float


def _best(
    windows: int, worths: Sequence[float], costs: Sequence[float], waited_s: float, rate: float | None = None
) -> _Best:
    """The best prefix of candidates sorted by worth; `costs[n]` is the pass with n of them.

    Best is most tokens a second or, where a `rate` says what a token is worth, most time saved by it.
    """
    tokens, seconds = float(windows), costs[0] + waited_s
    score = tokens / seconds if rate is None else tokens / rate - seconds
    best, best_rate, best_score = 0, tokens / seconds, score
    # Speculation must promise a little more than it may be wrong by.
    needed = score + MARGIN * (tokens / costs[0] if rate is None else tokens / rate)
    for n, worth in enumerate(worths, start=1):
        tokens += worth
        seconds = costs[n] + waited_s
        score = tokens / seconds if rate is None else tokens / rate - seconds
        if score > needed:
            best, best_rate, best_score, needed = n, tokens / seconds, score, score
    return _Best(best, best_rate, best_score)


def _of_kind(offers: Sequence[Offer], kind: Kind) -> Offer | None:
    return next((offer for offer in offers if offer.kind is kind and offer.count > 0), None)
