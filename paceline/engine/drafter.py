"""The drafter: a small model that runs ahead of one or many targets, batched over all their sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.engine.attention import Window
from paceline.engine.kv_cache import KVCache, KVEntry
from paceline.engine.runner import Runner
from paceline.engine.scheduler import GROWTH
from paceline.speculation import sampling
from paceline.speculation.frames import DraftFailureReason
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Drafted:
    """Candidates for positions base, base + 1, … of a sequence, or the reason there are none."""

    key: Any
    base: int
    tokens: tuple[int, ...] = ()
    failure: DraftFailureReason | None = None


@dataclass(eq=False, slots=True)
class _Draft:
    """`agreed` tokens came from the target; `drafted` follow them; `entry` holds KV of a prefix of both."""

    key: Hashable
    agreed: list[int]
    params: SamplingParams
    depth: int
    prompt_length: int
    entry: KVEntry | None = None
    drafted: list[int] = field(default_factory=list)
    answered: bool = False

    @property
    def length(self) -> int:
        return len(self.agreed) + len(self.drafted)

    @property
    def pending(self) -> int:
        """Tokens whose KV is missing."""
        return self.length - (self.entry.length if self.entry is not None else 0)

    def rows(self) -> Rows:
        """The row that draws its next token, with the history the target will have there."""
        return Rows(self.params, self.prompt_length, self.agreed, self.drafted)

    def tokens_from(self, start: int, limit: int) -> list[int]:
        """Up to `limit` tokens from position `start` on, agreed ones and drafted ones."""
        split = len(self.agreed)
        head = self.agreed[start : start + limit]
        return head + self.drafted[max(0, start - split) : max(0, start + limit - split)]


class Drafter:
    """Sequences are opened, advanced and closed under keys of the caller's; `step` runs one ragged batch.

    A sequence is drafted token by token with the coupled noise until it has `depth` candidates. When the
    target advances, candidates that turned out right keep their KV and count as already drafted.
    """

    def __init__(self, runner: Runner, kv: KVCache, *, max_batched_tokens: int, max_model_len: int) -> None:
        self.kv = kv
        self._runner = runner
        self._budget = max_batched_tokens
        self._max_model_len = max_model_len
        self._drafts: dict[Hashable, _Draft] = {}
        self._outbox: list[Drafted] = []
        self.drafted_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or any(self._wants_work(draft) for draft in self._drafts.values())

    @property
    def num_sequences(self) -> int:
        return len(self._drafts)

    def open(
        self,
        key: Hashable,
        tokens: Sequence[int],
        params: SamplingParams,
        depth: int,
        prompt_length: int | None = None,
    ) -> None:
        """Begin, or begin again, with the whole history. `depth` 0 only prefills.

        The first `prompt_length` tokens are the prompt, None means all.
        """
        self.close(key)
        if not tokens or not self._known(tokens):
            self._outbox.append(Drafted(key, len(tokens), failure=DraftFailureReason.INTERNAL))
            return
        prompt = len(tokens) if prompt_length is None else prompt_length
        self._drafts[key] = _Draft(key, list(tokens), params, depth, prompt)

    def advance(self, key: Hashable, base: int, tokens: Sequence[int], depth: int) -> None:
        """The target agreed on `tokens` from position `base`: roll back what differs, then draft `depth` more."""
        draft = self._drafts.get(key)
        if draft is None or base > len(draft.agreed):
            reason = DraftFailureReason.UNKNOWN_SEQUENCE if draft is None else DraftFailureReason.BASE_MISMATCH
            self._outbox.append(Drafted(key, base, failure=reason))
            return
        if not self._known(tokens):
            self._outbox.append(Drafted(key, base, failure=DraftFailureReason.INTERNAL))
            self.close(key)
            return
        guessed = draft.agreed[base:] + draft.drafted
        same = _common_prefix(guessed, tokens)
        if draft.entry is not None:
            self.kv.truncate(draft.entry, base + same)
        draft.agreed[base:] = tokens
        draft.drafted = guessed[same:] if same == len(tokens) else []
        draft.depth, draft.answered = depth, False

    def close(self, key: Hashable) -> None:
        """Forget a sequence; its KV stays behind as cache for the session's next turn."""
        draft = self._drafts.pop(key, None)
        if draft is not None and draft.entry is not None:
            # Guesses are cut off, so that the next turn continues the entry in place.
            self.kv.truncate(draft.entry, len(draft.agreed))
            self.kv.release(draft.entry)

    def step(self) -> list[Drafted]:
        """One forward pass over every sequence with work. Returns what became ready."""
        ready, self._outbox = self._outbox, []
        batch = self._schedule(ready)
        if batch:
            logits = self._runner.run([window for _, window in batch])
            for draft, window in batch:
                self.kv.append(draft.entry, window.token_ids)  # type: ignore[arg-type]
            drawing = [draft for draft, window in batch if window.sample]
            for draft, tokens in zip(drawing, sampling.draw(logits, [draft.rows() for draft in drawing]), strict=True):
                draft.drafted += tokens
            self.drafted_tokens += len(drawing)
        ready += [self._answer(draft) for draft in self._drafts.values() if self._is_ready(draft)]
        return ready

    def _schedule(self, ready: list[Drafted]) -> list[tuple[_Draft, Window]]:
        budget, batch = self._budget, []
        # Shortest first: a long prompt must not make the running drafts late.
        for draft in sorted(self._drafts.values(), key=lambda draft: draft.pending):
            if budget <= 0:
                break
            if not self._wants_work(draft) or self._is_ready(draft):
                continue
            entry = self._room(draft)
            if entry is None:
                ready.append(Drafted(draft.key, len(draft.agreed), failure=DraftFailureReason.BUSY))
                self.close(draft.key)
                continue
            # A token is drawn from the logits of the one before it, so at least that one is computed.
            self.kv.truncate(entry, draft.length - 1)
            chunk = draft.tokens_from(entry.length, budget)
            complete = len(chunk) == draft.pending and len(draft.drafted) < draft.depth
            batch.append((draft, Window(entry, chunk, sample=int(complete))))
            budget -= len(chunk)
        return batch

    def _wants_work(self, draft: _Draft) -> bool:
        """Something to compute or to say: candidates are owed, or KV of agreed tokens is missing."""
        if draft.depth > 0:
            return not draft.answered
        behind = draft.entry is None or draft.entry.length < len(draft.agreed) - 1
        return behind and draft.length < self._max_model_len

    def _is_ready(self, draft: _Draft) -> bool:
        """All candidates are there, or the context ends."""
        full = len(draft.drafted) >= draft.depth or draft.length >= self._max_model_len
        return draft.depth > 0 and not draft.answered and full

    def _answer(self, draft: _Draft) -> Drafted:
        draft.answered = True
        return Drafted(draft.key, len(draft.agreed), tuple(draft.drafted[: draft.depth]))

    def _room(self, draft: _Draft) -> KVEntry | None:
        room = min(self._max_model_len, draft.length + GROWTH)
        if draft.entry is None:
            draft.entry = self.kv.reserve(draft.tokens_from(0, draft.length), room)
            return draft.entry
        enough = draft.length <= draft.entry.charged or self.kv.extend(draft.entry, room)
        return draft.entry if enough else None

    def _known(self, tokens: Sequence[int]) -> bool:
        """Whether these are ids of this model; a target's may have a larger vocabulary."""
        return all(0 <= token < self._runner.vocab_size for token in tokens)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
