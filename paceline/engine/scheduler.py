"""Which sequences run, and which tokens go into the next forward pass.

Order is one rule everywhere: priority, lower first, then arrival. By it sequences are admitted, get KV room,
share the prefill budget; backwards they yield. Admission is strict: a sequence for which there is no room lets
nobody pass, so that small requests cannot starve a big one. There are two exceptions: a sequence that waits for a
running one to compute the prefix they share (`_Hold`), and one whose KV is on its way from host memory or disk
(`Restores`). They end when that is done, whoever has passed by then.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.engine.attention import Window
from paceline.engine.backlog import Backlog
from paceline.engine.kv_cache import FORK_MIN_TOKENS, KVCache, KVEntry
from paceline.engine.restores import Restores
from paceline.engine.sequence import Sequence
from paceline.errors import EngineError
from paceline.speculation.proposer import Proposal

GROWTH = 64
"""Tokens of KV room a sequence is given ahead of need; half of it is more than any verification window."""
HOLD_MIN_TOKENS = 64
"""A sequence waits for a running one if that saves it this much prefill, about a short step's; another output of
the same request waits for whatever can be copied."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part of a step: its window, and the candidates at the window's end.

    The last `draws` of the window's sampled rows draw tokens; rows before them tell a prompt's log probabilities.
    For `unused` candidates more there was no room.
    """

    sequence: Sequence
    window: Window
    proposal: Proposal | None = None
    draws: int = 0
    unused: int = 0

    @property
    def candidates(self) -> tuple[int, ...]:
        return self.proposal.tokens if self.proposal is not None else ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens beside the latest and its candidates: a prompt's, or those of a text computed again."""
        return len(self.window.token_ids) - 1 - len(self.candidates)


@dataclass(frozen=True, slots=True)
class _Hold:
    """Wait until `leader` has computed `length` tokens, which are this sequence's first ones too."""

    leader: Sequence
    length: int

    @property
    def over(self) -> bool:
        """Computed, or the leader was preempted, cancelled or is done: it has no running entry then."""
        return self.leader.entry is None or self.leader.entry.length >= self.length


def rank(sequence: Sequence) -> tuple[int, int]:
    """Who comes first: lower priority values, then earlier arrival."""
    return sequence.request.priority, sequence.sequence_id


@dataclass(slots=True)
class Scheduler:
    """Running streams come before prompts in a step; prompts come in chunks, smaller ones while streams run.

    `max_prefill_while_decoding` bounds the prompt tokens of a step in which a stream runs, and so the time
    between two of the stream's tokens. None: `max_batched_tokens` alone does. `restores` None: KV that was evicted is
    computed again.
    """

    kv: KVCache
    max_num_seqs: int
    max_batched_tokens: int
    max_prefill_while_decoding: int | None = None
    restores: Restores | None = None
    backlog: Backlog = field(default_factory=Backlog)
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    _holds: dict[int, _Hold] = field(default_factory=dict)
    preemptions: int = 0
    """Sequences that ran and had to yield."""

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, or one that lost its KV. Its history rebuilds it: its tokens stay the same."""
        insort(self.waiting, sequence, key=rank)
        self.backlog.add(sequence.sequence_id, self._to_prefill(sequence))

    def admit(self) -> list[Sequence]:
        """Move sequences from waiting to running while there is room. Returns those that run for the first time."""
        admitted = []
        self._begin_restores()
        for sequence in list(self.waiting):
            if self._awaits(sequence) or self._held(sequence):
                continue
            entry = self._place(sequence)
            if entry is None:
                break
            self._dequeue(sequence)
            self.running.append(sequence)
            sequence.entry = entry
            if sequence.owes_prompt:
                self.kv.truncate(entry, len(sequence.prompt_logprobs))
            if not sequence.admitted:
                sequence.admitted = sequence.clock()
                sequence.cached_tokens = min(entry.length, sequence.prompt_length)
                admitted.append(sequence)
        return admitted

    def schedule(self, proposals: Mapping[int, Proposal]) -> list[Scheduled]:
        """The next step under the token budget: decode and verification windows, then prefill chunks."""
        self._make_room()
        ranked = sorted(self.running, key=rank)
        ready = [sequence for sequence in ranked if sequence.pending == 1][: self.max_batched_tokens]
        prompts = [sequence for sequence in ranked if sequence.pending > 1]
        budget = self.max_batched_tokens - len(ready)
        # Where tokens are scarce, candidates leave prompts a half.
        step = self._decode(ready, proposals, budget // 2 if prompts else budget)
        budget -= sum(len(part.candidates) for part in step)
        if self.max_prefill_while_decoding is not None and any(sequence.decoding for sequence in ready):
            budget = min(budget, self.max_prefill_while_decoding)
        return step + self._prefill(prompts, budget)

    @property
    def missing_tokens(self) -> int:
        """Tokens running sequences have to compute before they can go on."""
        return sum(sequence.pending for sequence in self.running if sequence.pending > 1)

    def prefill_ahead(self) -> int:
        """Prompt tokens the next step has room for beside its decodes, as far as that is known now."""
        missing = self.missing_tokens
        if not missing:
            return 0
        decoding = sum(sequence.decoding for sequence in self.running)
        budget = self.max_batched_tokens - decoding
        if decoding and self.max_prefill_while_decoding is not None:
            budget = min(budget, self.max_prefill_while_decoding)
        return max(0, min(missing, budget))

    def goes_on_with(self, sequences: list[Sequence]) -> bool:
        """Whether the next step will be one more token of exactly these, as far as that is known now; makes room for
        it in the KV cache. Not if a waiting one could take its place beside one of them, or in place of one."""
        if len(sequences) != len(self.running) or (self.waiting and len(self.running) < self.max_num_seqs):
            return False
        if self.waiting and any(each.request.priority > self.waiting[0].request.priority for each in sequences):
            return False
        return all(self._has_room_after(sequence) for sequence in sequences)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its KV stays behind as cache."""
        self._dequeue(sequence)
        if sequence.entry is not None:
            self.running.remove(sequence)
            self.kv.release(sequence.entry)
            sequence.entry = None

    def check(self) -> None:
        """Raise EngineError unless exactly the running sequences hold exactly the KV in use."""
        charged = sum(sequence.kv.charged for sequence in self.running)
        if charged != self.kv.usage().in_use:
            raise EngineError(f"running sequences hold {charged} KV tokens of {self.kv.usage()}")
        self.backlog.check(sequence.sequence_id for sequence in self.waiting)
        if any(sequence.entry is not None for sequence in self.waiting) or len(self.running) > self.max_num_seqs:
            raise EngineError("a waiting sequence holds KV, or too many run")
        if not self._holds.keys() <= {sequence.sequence_id for sequence in self.waiting}:
            raise EngineError("a sequence that does not wait is held")
        if self.restores is not None:
            self.restores.check(self.waiting)

    def _to_prefill(self, sequence: Sequence) -> int:
        """An estimate: what is held may be gone by its turn, and what is below the KV cache may be back."""
        if sequence.leader is not None:
            return 1  # it takes its prompt over
        return len(sequence.tokens) - self.kv.match(sequence.tokens, sequence.request.session_id, sequence.window)

    def _begin_restores(self) -> None:
        """Also for sequences whose turn is not yet."""
        for sequence in self.waiting:
            self._awaits(sequence)

    def _awaits(self, sequence: Sequence) -> bool:
        return self.restores is not None and self.restores.awaits(sequence)

    def _held(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing a prefix that this one would compute again."""
        hold = self._holds.get(sequence.sequence_id)
        if hold is not None and not hold.over:
            return True
        hold = self._find_hold(sequence)
        if hold is None:
            self._holds.pop(sequence.sequence_id, None)
            return False
        self._holds[sequence.sequence_id] = hold
        return True

    def _find_hold(self, sequence: Sequence) -> _Hold | None:
        """The longest useful one. Only those who come first by rank lead: they also get the prefill budget first."""
        if sequence.owes_prompt:
            return None
        shared = {
            leader: min(_shared(leader, sequence), len(sequence.tokens) - 1)
            for leader in self.running
            if leader.pending > 1 and rank(leader) < rank(sequence)
        }
        leader = max(shared, key=lambda each: shared[each], default=None)
        if leader is None:
            return None
        least = FORK_MIN_TOKENS if leader is sequence.leader else HOLD_MIN_TOKENS
        if shared[leader] - leader.kv.length < least:
            return None
        stored = self.kv.match(sequence.tokens, sequence.request.session_id, sequence.window)
        return _Hold(leader, shared[leader]) if shared[leader] - stored >= least else None

    def _place(self, sequence: Sequence) -> KVEntry | None:
        """KV for a sequence that has a slot; running ones of lower priority yield slot and KV if they must."""
        room, priority = _room_for(sequence), sequence.request.priority
        yielding = sorted((each for each in self.running if each.request.priority > priority), key=rank)
        usage = self.kv.usage()
        if room > usage.total - usage.in_use + sum(each.kv.charged for each in yielding):
            return None
        while True:
            if len(self.running) < self.max_num_seqs:
                if self.restores is not None:
                    self.restores.deliver(sequence)
                entry = self.kv.reserve(sequence.tokens, room, sequence.request.session_id, sequence.window)
                if entry is not None:
                    return entry
            if not yielding:
                return None
            self._preempt(yielding.pop())

    def _make_room(self) -> None:
        """Give every running sequence room to grow, the first by rank first; where there is none the last yields."""
        ranked = sorted(self.running, key=rank)
        served = 0
        while served < len(ranked):
            if self._extend(ranked[served]):
                served += 1
            else:
                self._preempt(ranked.pop())

    def _extend(self, sequence: Sequence) -> bool:
        """In stretches: contiguous memory on a GPU moves when it grows."""
        enough = sequence.kv_room(len(sequence.tokens) + GROWTH // 2)
        return sequence.kv.charged >= enough or self.kv.extend(sequence.kv, _room_for(sequence))

    def _has_room_after(self, sequence: Sequence) -> bool:
        """For the token after the one that is being computed, without a shift of a streaming window before it."""
        return self._extend(sequence) and sequence.kv.left >= 2

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.remove(sequence)
        self.add(sequence)

    def _decode(self, sequences: list[Sequence], proposals: Mapping[int, Proposal], budget: int) -> list[Scheduled]:
        """A token each, and candidates until the budget is spent."""
        step = []
        for sequence in sequences:
            self.kv.shift(sequence.kv)
            spare = max(0, min(budget, sequence.kv.left - 1))
            proposal, unused = proposals.get(sequence.sequence_id), 0
            if proposal is not None:
                unused = max(0, len(proposal.tokens) - spare)
                proposal = proposal.first(spare)
            drafted = proposal.tokens if proposal is not None else ()
            window = Window(sequence.kv, (sequence.tokens[-1], *drafted), sample=1 + len(drafted))
            step.append(Scheduled(sequence, window, proposal, draws=window.sample, unused=unused))
            budget -= len(drafted)
        return step

    def _prefill(self, sequences: list[Sequence], budget: int) -> list[Scheduled]:
        """Chunks of what is missing, in the order given, until the budget is spent; none goes past a point where a
        streaming window shifts."""
        step = []
        for sequence in sequences:
            if budget <= 0:
                break
            self.kv.shift(sequence.kv)
            start = sequence.kv.length
            chunk = sequence.tokens[start : start + min(budget, sequence.kv.left)]
            draws = int(len(chunk) == sequence.pending)
            window = Window(sequence.kv, chunk, sample=len(chunk) if sequence.owes_prompt else draws)
            step.append(Scheduled(sequence, window, draws=draws))
            budget -= len(chunk)
        return step

    def _dequeue(self, sequence: Sequence) -> None:
        self._holds.pop(sequence.sequence_id, None)
        if self.restores is not None:
            self.restores.forget(sequence)
        at = bisect_left(self.waiting, rank(sequence), key=rank)
        if at < len(self.waiting) and self.waiting[at] is sequence:
            del self.waiting[at]
            self.backlog.remove(sequence.sequence_id)


def _room_for(sequence: Sequence) -> int:
    """KV room for what it has and a stretch of what may come, at most what it may ever need."""
    return sequence.kv_room(len(sequence.tokens) + GROWTH)


def _shared(a: Sequence, b: Sequence) -> int:
    """How many first tokens have the same keys and values in both."""
    same = _common_prefix(a.tokens, b.tokens)
    if a.window == b.window:
        return same
    return min(same, *(each.window.ctx_size for each in (a, b) if each.window is not None))


def _common_prefix(a: list[int], b: list[int]) -> int:
    """By bisection over slices: comparing lists in C is fast, and most pairs differ at once."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
