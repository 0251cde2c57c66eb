"""The ladder of sources: a draft model, else prompt lookup, else nothing; and who is asked for how much.

    commit ──► learn what stood ──► ask drafts for the next step ─ ─ (they work) ─ ─► propose ──► take what is there

A policy decides twice a step: what to ask of the drafts, as soon as the last step is known, and what to take once
they have answered. Prompt lookup costs nothing to ask, so what it would have said is known for every token, used or
not. A draft is told of tokens only when it is wanted: one that is not, stays idle and catches up later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.config import SpeculationSettings
from paceline.speculation.acceptance import Kind, agreeing
from paceline.speculation.controller import Choice, Controller, FixedDepth, Offer, Policy, Spent
from paceline.speculation.cost import VerifyCost
from paceline.speculation.frames import Advance
from paceline.speculation.gain import DraftDemand
from paceline.speculation.lookup import Match, PromptLookup
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave one sequence: `tokens` from position `base` on. `room`: candidates that make sense next.

    `rows` were drawn for it; a sequence that was not decoding computed the end of its prompt.
    """

    sequence: int
    base: int
    tokens: tuple[int, ...]
    rows: int
    room: int
    decoding: bool
    finished: bool


@dataclass(frozen=True, slots=True)
class Proposed:
    """Candidates by sequence; `late` are those whose draft was asked and had none in time."""

    found: Mapping[int, Proposal] = field(default_factory=dict)
    late: frozenset[int] = frozenset()


@dataclass(eq=False, slots=True)
class _State:
    """`told`: how many tokens the draft knows, 0 if it does not know the sequence.

    `asked` candidates were asked of it for the next step; `drafted` and `guess` are what the two sources said of the
    present position, `match` is where the guess is from.
    """

    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    lookup: PromptLookup | None
    trace: str = ""
    told: int = 0
    asked: int = 0
    drafted: tuple[int, ...] = ()
    match: Match | None = None
    guess: tuple[int, ...] = ()


class Speculator:
    """Candidates for an engine's running sequences. The engine calls, from its own thread: `open` when a sequence is
    admitted, `propose` before each step, `commit` after it, `close` at the end.

    `draft` and `lookup_tokens` are the sources, None and 0 if there are none; `max_depth` bounds both.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_depth: int,
        draft: Proposer | None = None,
        lookup_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy = policy
        self._max_depth = max_depth
        self._draft = draft
        self._lookup_tokens = min(lookup_tokens, max_depth)
        self._clock = clock
        self._states: dict[int, _State] = {}
        self._used: frozenset[Kind] = frozenset()
        self._taken: frozenset[int] = frozenset()
        self.demand = DraftDemand()
        self._proposed_at = self._own_s = 0.0

    @property
    def cost(self) -> VerifyCost | None:
        """What a pass costs by its rows, if that was measured."""
        return self.policy.cost

    @property
    def drafts_wanted(self) -> int | None:
        """Sequences that would take drafts; None if there is no such source."""
        return None if self._draft is None else len(self._states)

    @property
    def draft_saved_s(self) -> float | None:
        """Seconds that drafts have saved, negative if they cost more; None if nobody knows."""
        return None if self._draft is None or self.policy.gain is None else self.policy.gain.saved_s

    def open(
        self,
        sequence: int,
        tokens: Sequence[int],
        params: SamplingParams,
        prompt_length: int | None = None,
        *,
        trace: str = "",
    ) -> None:
        """A sequence begins. The first `prompt_length` of its tokens are the prompt, None means all."""
        longest = params.window.ctx_size if params.window is not None else None
        lookup = PromptLookup(tokens, longest) if self._lookup_tokens else None
        prompt = len(tokens) if prompt_length is None else prompt_length
        state = self._states[sequence] = _State(list(tokens), prompt, params, lookup, trace)
        if self._draft is not None and not self.policy.rests(Kind.DRAFT):
            self._introduce(sequence, state)

    def propose(self, wanted: Sequence[Wanted], prefill: int = 0) -> Proposed:
        """Candidates for the sequences that decode in the step, all of which `wanted` names, if with depth 0."""
        began = self._clock()
        fetched, late = self._fetch(wanted)
        offers = {want.sequence: self._offers(want, fetched.get(want.sequence)) for want in wanted}
        choices = self.policy.take(offers, prefill)
        found = {}
        for sequence, choice in choices.items():
            found[sequence] = self._proposal(sequence, choice, fetched)
        self._taken = frozenset(sequence for sequence, choice in choices.items() if choice.kind is Kind.DRAFT)
        self.demand.without += len(late)
        kinds = {choice.kind for choice in choices.values()}
        self._used = frozenset(kinds | {Kind.DRAFT} if fetched or late else kinds)
        self._proposed_at = self._clock()
        self._own_s += self._proposed_at - began
        return Proposed(found, late)

    def commit(self, outcomes: Sequence[Outcome], prefilled: int, prefill: int) -> None:
        """A step is over: it `prefilled` prompt tokens beside its decodes, the next will prefill some `prefill`."""
        began = self._clock()
        guessed = {outcome.sequence: self._learn(outcome) for outcome in outcomes}
        decoded = [outcome for outcome in outcomes if outcome.decoding]
        if decoded:
            tokens, rows = (sum(counts) for counts in zip(*((len(o.tokens), o.rows) for o in decoded), strict=True))
            forward_s, (drafts, added) = began - self._proposed_at, self._from_drafts(decoded, guessed)
            self.policy.note_step(
                Spent(len(decoded), rows, prefilled, tokens, forward_s, self._own_s, self._used, drafts, added)
            )
        self._ask({o.sequence: o.room for o in outcomes if not o.finished}, prefill)
        self._own_s = self._clock() - began

    def close(self, sequence: int) -> None:
        """The sequence ended or was cancelled."""
        state = self._states.pop(sequence, None)
        self.policy.close(sequence)
        if self._draft is not None and state is not None and state.told:
            self._draft.close(sequence)

    def _from_drafts(self, decoded: Sequence[Outcome], guessed: Mapping[int, int]) -> tuple[int, int]:
        """Rows of drafts' candidates, and tokens that came of them and would not have come of prompt lookup."""
        with_drafts = [outcome for outcome in decoded if outcome.sequence in self._taken]
        rows = sum(outcome.rows - 1 for outcome in with_drafts)
        return rows, sum(max(0, len(outcome.tokens) - 1 - guessed[outcome.sequence]) for outcome in with_drafts)

    def _learn(self, outcome: Outcome) -> int:
        """Compare what each source said with what came, whether it was used or not. How many tokens prompt lookup had
        right, as far as it may be used."""
        state, hits = self._states.get(outcome.sequence), 0
        if state is None:
            return 0
        if state.drafted:
            self.policy.note_run(outcome.sequence, Kind.DRAFT, 0, *agreeing(state.drafted, outcome.tokens))
        if state.match is not None:
            hits, missed = agreeing(state.guess, outcome.tokens)
            self.policy.note_run(outcome.sequence, Kind.LOOKUP, state.match.length, hits, missed)
        state.asked, state.drafted, state.match, state.guess = 0, (), None, ()
        state.tokens += outcome.tokens
        if state.lookup is None:
            return 0
        state.lookup.extend(outcome.tokens)
        state.match = state.lookup.match()
        if state.match is not None:
            state.guess = state.lookup.candidates(state.match, self._lookup_tokens)
        return 0 if self.policy.rests(Kind.LOOKUP) else hits

    def _ask(self, rooms: Mapping[int, int], prefill: int) -> None:
        draft = self._draft
        if draft is None:
            return
        offers = {}
        for sequence, room in rooms.items():
            offers[sequence] = offer = self._lookup_offers(sequence, room)
            state = self._states.get(sequence)
            if state is not None and room > 0 and (not state.told or draft.serves(sequence)):
                offer.append(Offer(Kind.DRAFT, min(room, self._max_depth)))
        depths = self.policy.ask(offers, prefill, draft.latency)
        self._note_demand(offers, rooms, [depth for depth in depths.values() if depth])
        updates = []
        for sequence in offers:
            state = self._states.get(sequence)
            if state is None:
                continue
            state.asked = depths.get(sequence, 0)
            if state.asked and not state.told:
                self._introduce(sequence, state)
            # One that no drafter serves is told all the same: that is how a new drafter gets it.
            if state.asked or (state.told and not draft.serves(sequence)):
                updates.append(Advance(sequence, state.told, tuple(state.tokens[state.told :]), state.asked))
                state.told = len(state.tokens)
        if updates:
            draft.advance(updates)

    def _note_demand(self, offers: Mapping[int, Sequence[Offer]], rooms: Mapping[int, int], asked: list[int]) -> None:
        """A sequence that no drafter serves wants drafts as the others do; if there are no others, it does."""
        self.demand.tokens += sum(asked)
        self.demand.steps += len(asked)
        told = [name for name in offers if (state := self._states.get(name)) is not None and state.told]
        served = [name for name in told if any(offer.kind is Kind.DRAFT for offer in offers[name])]
        if self.policy.rests(Kind.DRAFT) or (served and not asked):
            return
        left = sum(rooms[name] > 0 for name in told) - len(served)
        self.demand.steps += left
        self.demand.without += left

    def _introduce(self, sequence: int, state: _State) -> None:
        assert self._draft is not None
        self._draft.open(sequence, state.tokens[: state.prompt_length], state.params, state.trace)
        state.told = state.prompt_length

    def _fetch(self, wanted: Sequence[Wanted]) -> tuple[Mapping[int, Proposal], frozenset[int]]:
        """What the draft has of what it was asked for, and the sequences for which it has nothing."""
        asked = []
        for want in wanted:
            state = self._states.get(want.sequence)
            if state is not None and (depth := min(want.depth, state.asked)) > 0:
                asked.append(Wanted(want.sequence, want.base, depth))
        if not asked or self._draft is None:
            return {}, frozenset()
        found = self._draft.propose(asked)
        for sequence, proposal in found.items():
            self._states[sequence].drafted = proposal.tokens
        return found, frozenset(want.sequence for want in asked) - found.keys()

    def _offers(self, want: Wanted, drafted: Proposal | None) -> list[Offer]:
        offers = self._lookup_offers(want.sequence, want.depth)
        if drafted is not None and drafted.tokens:
            offers.append(Offer(Kind.DRAFT, len(drafted.tokens)))
        return offers

    def _lookup_offers(self, sequence: int, room: int) -> list[Offer]:
        state = self._states.get(sequence)
        if state is None or state.match is None or room <= 0:
            return []
        return [Offer(Kind.LOOKUP, min(room, len(state.guess)), state.match.length)]

    def _proposal(self, sequence: int, choice: Choice, fetched: Mapping[int, Proposal]) -> Proposal:
        if choice.kind is Kind.DRAFT:
            return fetched[sequence].first(choice.depth)
        return Proposal(self._states[sequence].guess[: choice.depth], Source.LOOKUP)


def speculator_for(
    settings: SpeculationSettings, draft: Proposer | None, cost: Callable[[], VerifyCost]
) -> Speculator | None:
    """As configured; None if it is switched off or there is no source. `cost` is called if depths are adaptive."""
    if not settings.enabled or (draft is None and settings.prompt_lookup_num_tokens == 0):
        return None
    if settings.depth == "auto":
        policy: Policy = Controller(cost())
        depth = settings.max_depth
    else:
        policy, depth = FixedDepth(settings.depth), settings.depth
    return Speculator(policy, max_depth=depth, draft=draft, lookup_tokens=settings.prompt_lookup_num_tokens)
