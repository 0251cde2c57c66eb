"""The drafter: a small model that runs ahead of one or many targets, batched over all their sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline.engine.attention import Window
from paceline.engine.kv_cache import KVCache, KVEntry
from paceline.engine.runner import Runner
from paceline.engine.scheduler import GROWTH
from paceline.errors import InvalidRequest
from paceline.sessions.window import StreamingWindow
from paceline.speculation import rejection, sampling
from paceline.speculation.frames import MAX_AHEAD, MAX_DEPTH, DraftFailureReason, SparseRow
from paceline.speculation.grammar import Grammars, Matcher
from paceline.speculation.run import common_prefix
from paceline.speculation.sampling import Rows
from paceline.speculation.telemetry import DraftedSequence
from paceline.types import SamplingParams

MAX_SEQUENCES = 1024
"""Open at once; one more is BUSY. KV room usually ends earlier."""
PROMPT_TOKENS = 32
"""A sequence that misses more KV than this is prefilled after the others, in chunks; one that nobody wants drafted
is brought up to date in pieces of this size."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """Candidates for positions base + offset, … of a sequence with `base` agreed tokens, or why there are none.

    `final`: nothing follows, the context ends.
    """

    key: Any
    base: int
    tokens: tuple[int, ...] = ()
    failure: DraftFailureReason | None = None
    offset: int = 0
    probs: tuple[SparseRow, ...] = ()
    final: bool = False


@dataclass(eq=False, slots=True)
class _Draft:
    """`agreed` tokens came from the target; `drafted` follow them; `entry` holds KV of a prefix of both.

    `depth` candidates are owed until they are `answered`, then up to `allowance` more, at most `ahead`, are drafted
    while the target is busy. `sent` of the drafted ones the caller has. A `parked` sequence gave its KV away.

    `limit` is the longest text the model takes. Under a streaming `window` there is none, but no more is drafted than
    the window has room for with what is agreed: what it drops then is gone, and a candidate may turn out wrong.

    Of one with a `trace`, it is told in the end what was `made` for it, and when it was opened.
    """

    key: Hashable
    agreed: list[int]
    params: SamplingParams
    depth: int
    prompt_length: int
    limit: int
    window: StreamingWindow | None = None
    ahead: int = 0
    allowance: int = 0
    rejection: bool = False
    streaming: bool = False
    matcher: Matcher | None = None
    entry: KVEntry | None = None
    drafted: list[int] = field(default_factory=list)
    probs: list[SparseRow] = field(default_factory=list)
    sent: int = 0
    answered: bool = False
    parked: bool = False
    trace: str = ""
    opened: int = 0
    history: int = 0
    made: int = 0
    rolled_back: int = 0

    @property
    def length(self) -> int:
        return len(self.agreed) + len(self.drafted)

    @property
    def pending(self) -> int:
        """Tokens whose KV is missing."""
        return self.length - (self.entry.length if self.entry is not None else 0)

    @property
    def end(self) -> int:
        """The length it may be drafted to now: a token is drawn even where the next one has no room."""
        return self.limit if self.window is None else self.window.edge(len(self.agreed)) + 1

    @property
    def ended(self) -> bool:
        """Whether its context ends here for good."""
        return self.window is None and self.length >= self.limit

    def kv_room(self, tokens: int) -> int:
        """Tokens held in KV, at most, while it grows to so many tokens."""
        return min(tokens, self.limit if self.window is None else self.window.ctx_size)

    def rows(self, ahead: int = 0) -> Rows:
        """The row that draws its next token, or the one `ahead` of it, with the history the target will have there."""
        following = self.drafted + [0] * ahead if ahead else self.drafted
        return Rows(self.params, self.prompt_length, self.agreed, following, matcher=self.matcher)

    def tokens_from(self, start: int, limit: int) -> list[int]:
        """Up to `limit` tokens from position `start` on, agreed ones and drafted ones."""
        split = len(self.agreed)
        head = self.agreed[start : start + limit]
        return head + self.drafted[max(0, start - split) : max(0, start + limit - split)]

    def agree(self, tokens: Sequence[int]) -> int:
        """Take the target's tokens; what was drafted beyond them stays if it begins with them. Returns how many of
        the drafted ones were right.

        The allowance doubles while the guesses hold and loses a quarter where they do not: tokens beyond a divergence
        are drafted for nothing. So it stays high if all of a turn is right three times in ten, and else goes to 0.
        """
        same = common_prefix(self.drafted, tokens)
        parted = same < min(len(self.drafted), len(tokens))
        self.allowance = self.allowance * 3 // 4 if parted else min(self.ahead, 2 * self.allowance + 1)
        keep = same if same == len(tokens) else len(self.drafted)
        del self.drafted[:keep], self.probs[:keep]
        self.sent = max(0, self.sent - same) if self.streaming and self.drafted else 0
        self.agreed += tokens
        if self.matcher is not None:
            for token in tokens:
                self.matcher.push(token)
        return same


class Drafter:
    """Sequences are opened, advanced and closed under keys of the caller's; `step` runs one ragged batch.

    A sequence is drafted token by token until it has `depth` candidates, then on for as long as its credit lasts.
    When the target advances, candidates that turned out right keep their KV and count as already drafted. Owed
    candidates come first; those ahead ride in the same forward pass; prompts come last, in chunks of at most
    `max_prefill_while_drafting`, so that they do not make the others late.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KVCache,
        *,
        max_batched_tokens: int,
        max_model_len: int,
        max_prefill_while_drafting: int | None = None,
        max_sequences: int = MAX_SEQUENCES,
        grammars: Grammars | None = None,
    ) -> None:
        self.kv = kv
        self.grammars = grammars
        self._runner = runner
        self._budget = max_batched_tokens
        self._prefill = max_prefill_while_drafting or max_batched_tokens
        self._max_model_len = max_model_len
        self._max_sequences = max_sequences
        self._drafts: dict[Hashable, _Draft] = {}
        self._outbox: list[Drafted] = []
        self.on_close: Callable[[DraftedSequence], object] | None = None
        """Hears of every traced sequence that ended, in the thread that steps; must neither block nor raise."""
        self.drafted_tokens = 0
        self.passes = 0
        """Forward passes made."""
        self.rolled_back_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._outbox) or any(
            self._wants_work(draft) or self._has_news(draft) for draft in self._drafts.values()
        )

    @property
    def num_sequences(self) -> int:
        return len(self._drafts)

    @property
    def owing(self) -> list[Any]:
        """Sequences whose caller waits for an answer."""
        return [draft.key for draft in self._drafts.values() if not draft.answered]

    def open(
        self,
        key: Hashable,
        tokens: Sequence[int],
        params: SamplingParams,
        depth: int,
        prompt_length: int | None = None,
        *,
        ahead: int = 0,
        rejection: bool = False,
        streaming: bool = False,
        trace: str = "",
    ) -> None:
        """Begin, or begin again, with the whole history. `depth` 0 only prefills.

        The first `prompt_length` tokens are the prompt, None means all. A `streaming` caller keeps what it gets: each
        token is sent once, also those up to `ahead` beyond the depth, and an empty answer when a prompt is prefilled.
        Others get `depth` candidates for each advance.
        """
        self.close(key)
        failure, matcher = None, None
        window = params.window
        prompt = len(tokens) if prompt_length is None else prompt_length
        try:
            matcher = self._matcher(params, tokens[prompt:])
        except InvalidRequest:
            failure = DraftFailureReason.UNSUPPORTED
        if not tokens or not self._known(tokens) or (window is not None and self.kv.shift_refusal is not None):
            failure = DraftFailureReason.UNSUPPORTED
        elif len(self._drafts) >= self._max_sequences:
            failure = DraftFailureReason.BUSY
        if failure is not None:
            self._outbox.append(Drafted(key, len(tokens), failure=failure))
            return
        if window is not None and window.ctx_size > self._max_model_len:
            window = None  # this model's own context ends before anything is dropped
        credit = min(ahead, MAX_AHEAD)
        self._drafts[key] = _Draft(
            key,
            list(tokens),
            params,
            min(depth, MAX_DEPTH),
            prompt,
            self._max_model_len,
            window,
            ahead=credit,
            allowance=credit,
            rejection=rejection,
            streaming=streaming,
            matcher=matcher,
            trace=trace,
            opened=time.time_ns(),
            history=len(tokens),
        )

    def advance(self, key: Hashable, base: int, tokens: Sequence[int], depth: int) -> None:
        """The target, at `base` agreed tokens, agreed on these: roll back what differs, then draft `depth` more."""
        draft = self._drafts.get(key)
        failure = None
        if draft is None:
            failure = DraftFailureReason.UNKNOWN_SEQUENCE
        elif base != len(draft.agreed):
            failure = DraftFailureReason.BASE_MISMATCH
        elif not self._known(tokens):
            failure = DraftFailureReason.UNSUPPORTED
        if draft is None or failure is not None:
            self._outbox.append(Drafted(key, base, failure=failure))
            self.close(key)
            return
        guessed = len(draft.drafted)
        same = draft.agree(tokens)
        wrong = guessed - same - len(draft.drafted)
        draft.rolled_back += wrong
        self.rolled_back_tokens += wrong
        if draft.entry is not None:
            self.kv.truncate(draft.entry, base + same + len(draft.drafted))
        draft.depth = min(depth, MAX_DEPTH)
        draft.answered = draft.answered and draft.depth == 0
        draft.parked = draft.parked and draft.depth == 0

    def close(self, key: Hashable) -> None:
        """Forget a sequence; its KV stays behind as cache for the session's next turn."""
        draft = self._drafts.pop(key, None)
        if draft is None:
            return
        self._give_up_room(draft)
        if draft.trace and self.on_close is not None:
            now = time.time_ns()
            self.on_close(DraftedSequence(draft.trace, draft.opened, now, draft.history, draft.made, draft.rolled_back))

    def _matcher(self, params: SamplingParams, output: Sequence[int]) -> Matcher | None:
        """Raises InvalidRequest for a grammar that cannot be followed here."""
        if params.grammar is None:
            return None
        if self.grammars is None:
            raise InvalidRequest("grammar: this draft came without its target's tokenizer", param="grammar")
        return self.grammars.matcher(params.grammar, output)

    def step(self) -> list[Drafted]:
        """One forward pass over every sequence with work. Returns what became ready."""
        ready, self._outbox = self._outbox, []
        batch = self._schedule(ready)
        if batch and not self._run_chain(batch):
            logits = self._runner.run([window for _, window in batch])
            self.passes += 1
            for draft, window in batch:
                self.kv.append(draft.entry, window.token_ids)  # type: ignore[arg-type]
            self._draw(logits, [draft for draft, window in batch if window.sample])
        news = [self._answer(draft) for draft in self._drafts.values() if self._has_news(draft)]
        return ready + [answer for answer in news if answer is not None]

    def _schedule(self, ready: list[Drafted]) -> list[tuple[_Draft, Window]]:
        budget = self._budget
        batch: list[tuple[_Draft, Window]] = []
        working = [draft for draft in self._drafts.values() if self._wants_work(draft)]
        drafting = any(draft.depth > 0 and draft.pending <= PROMPT_TOKENS for draft in self._drafts.values())
        prefill = self._prefill if drafting else self._budget
        # Prompts last; what is owed before what is ahead; the shortest first.
        working.sort(key=lambda draft: (draft.pending > PROMPT_TOKENS, not self._owes(draft), draft.pending))
        for draft in working:
            is_prompt = draft.pending > PROMPT_TOKENS
            limit = min(budget, prefill) if is_prompt else budget
            if limit <= 0:
                break
            entry = self._room(draft, [other for other, _ in batch])
            if entry is None:
                self._do_without(draft, ready)
                continue
            # A token is drawn from the logits of the one before it, so at least that one is computed.
            self.kv.truncate(entry, draft.length - 1)
            self.kv.shift(entry)
            chunk = draft.tokens_from(entry.length, min(limit, entry.left))
            complete = len(chunk) == draft.pending and len(draft.drafted) < self._goal(draft)
            batch.append((draft, Window(entry, chunk, sample=int(complete))))
            budget -= len(chunk)
            prefill -= len(chunk) if is_prompt else 0
        return batch

    def _run_chain(self, batch: list[tuple[_Draft, Window]]) -> bool:
        """If the model runs where its tokens are drawn: all that every member owes, each token from the one before,
        before any of them is looked at. Whether that was done."""
        drafts = [draft for draft, _ in batch]
        if any(draft.rejection or not window.sample for draft, window in batch):
            return False
        length = max(1, min(self._owed(draft, window) for draft, window in batch))
        launched = []
        for number in range(length):
            windows = [window for _, window in batch]
            if number:
                windows = [Window(each.entry, [0], 1, len(each.token_ids) + number - 1) for each in windows]
            rows = [each.rows(number) for each in drafts]
            found = self._runner.launch(windows, rows, range(len(batch)) if number else None)
            if found is None:
                return False
            launched.append(found)
        for number, each in enumerate(launched):
            for (draft, window), token in zip(batch, each.tokens(), strict=True):
                self.kv.append(window.entry, draft.drafted[-1:] if number else window.token_ids)
                draft.drafted.append(token)
                draft.made += 1
        self.passes += length
        self.drafted_tokens += length * len(batch)
        return True

    def _owed(self, draft: _Draft, window: Window) -> int:
        """Tokens it may draw in a row from here: those owed, as far as its entry has room. What a grammar lets follow
        is not known before the token is."""
        if draft.matcher is not None:
            return 1
        return min(
            draft.depth - len(draft.drafted), draft.end - draft.length, 1 + window.entry.left - len(window.token_ids)
        )

    def _draw(self, logits: torch.Tensor, drafts: list[_Draft]) -> None:
        """One more token for each; by one of the two rules, whose draws never mix."""
        for rejecting in (False, True):
            rows = [n for n, draft in enumerate(drafts) if draft.rejection is rejecting]
            if not rows:
                continue
            chosen = [drafts[n] for n in rows]
            these = logits if len(rows) == len(drafts) else logits[torch.tensor(rows, device=logits.device)]
            histories, columns = [draft.rows() for draft in chosen], self._runner.columns
            if rejecting:
                these = these if columns is None else columns.whole(these)
                for draft, (token, row) in zip(chosen, rejection.draft(these, histories), strict=True):
                    draft.drafted.append(token)
                    draft.probs.append(row)
            else:
                for draft, tokens in zip(chosen, sampling.draw(these, histories, columns), strict=True):
                    draft.drafted += tokens
        for draft in drafts:
            draft.made += 1
        self.drafted_tokens += len(drafts)

    def _goal(self, draft: _Draft) -> int:
        """Tokens to have drafted beyond the agreed ones, in the end."""
        wanted = draft.depth + draft.allowance if draft.depth else 0
        return max(0, min(wanted, draft.end - len(draft.agreed)))

    def _full(self, draft: _Draft) -> bool:
        """Whether it has the candidates owed, or there is no room for them."""
        return len(draft.drafted) >= draft.depth or draft.length >= draft.end

    def _owes(self, draft: _Draft) -> bool:
        return draft.depth > 0 and not draft.answered and not self._full(draft)

    def _behind(self, draft: _Draft) -> int:
        """Agreed tokens that could be computed now, so that drafting can begin at once."""
        if draft.ended or draft.parked:
            return 0
        return len(draft.agreed) - 1 - (draft.entry.length if draft.entry is not None else 0)

    def _wants_work(self, draft: _Draft) -> bool:
        """Candidates are owed, or allowed ahead; or KV of agreed tokens is missing."""
        if draft.depth > 0:
            return self._owes(draft) or (draft.answered and len(draft.drafted) < self._goal(draft))
        return self._behind(draft) >= (PROMPT_TOKENS if draft.answered else 1)

    def _has_news(self, draft: _Draft) -> bool:
        """Something to say: what was owed, or what came since."""
        if draft.answered:
            return draft.streaming and draft.depth > 0 and len(draft.drafted) > draft.sent
        if draft.depth > 0:
            return self._full(draft)
        return self._behind(draft) <= 0

    def _answer(self, draft: _Draft) -> Drafted | None:
        """What is owed or new; None if the caller has it already, or waits for nothing."""
        first, draft.answered = not draft.answered, True
        if not draft.streaming:
            if not draft.depth:
                return None
            end = draft.depth
            return Drafted(draft.key, len(draft.agreed), tuple(draft.drafted[:end]), probs=tuple(draft.probs[:end]))
        sent, end = draft.sent, len(draft.drafted) if draft.depth else draft.sent
        final = draft.ended and len(draft.drafted) < draft.depth
        if sent == end and draft.depth and not (first and final):
            return None
        draft.sent = end
        tokens, probs = tuple(draft.drafted[sent:end]), tuple(draft.probs[sent:end])
        return Drafted(draft.key, len(draft.agreed), tokens, offset=sent, probs=probs, final=final)

    def _room(self, draft: _Draft, batch: list[_Draft]) -> KVEntry | None:
        """KV for it, if need be that of a sequence that is neither wanted nor in the step's batch already."""
        room = draft.kv_room(draft.length + GROWTH)
        while True:
            if draft.entry is None:
                draft.entry = self.kv.reserve(draft.tokens_from(0, draft.length), room, window=draft.window)
                if draft.entry is not None:
                    return draft.entry
            elif draft.kv_room(draft.length) <= draft.entry.charged or self.kv.extend(draft.entry, room):
                return draft.entry
            if not self._park_one(draft, batch):
                return None

    def _park_one(self, beneficiary: _Draft, batch: list[_Draft]) -> bool:
        """Take the KV of a sequence nobody wants drafted now. False if there is none."""
        kept = (beneficiary, *batch)
        idle = (each for each in self._drafts.values() if not each.depth and each.entry and each not in kept)
        draft = next(idle, None)
        if draft is None or not beneficiary.depth:
            return False
        self._give_up_room(draft)
        draft.parked = draft.answered
        return True

    def _do_without(self, draft: _Draft, ready: list[Drafted]) -> None:
        """No room: what is ahead can wait, what is owed is refused."""
        if draft.depth > 0 and draft.answered:
            draft.allowance = 0
            return
        ready.append(Drafted(draft.key, len(draft.agreed), failure=DraftFailureReason.BUSY))
        self.close(draft.key)

    def _give_up_room(self, draft: _Draft) -> None:
        if draft.entry is not None:
            # Guesses are cut off, so that the next turn continues the entry in place.
            self.kv.truncate(draft.entry, len(draft.agreed))
            self.kv.release(draft.entry)
            draft.entry = None

    def _known(self, tokens: Sequence[int]) -> bool:
        """Whether these are ids of this model; a target's may have a larger vocabulary."""
        return all(0 <= token < self._runner.vocab_size for token in tokens)
