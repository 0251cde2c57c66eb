"""One request while the engine works on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from paceline.engine.detokenizer import Detokenizer
from paceline.engine.kv_cache import KVEntry
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow
from paceline.speculation.grammar import Matcher
from paceline.speculation.telemetry import SpeculationTally
from paceline.types import Delta, FinishReason, Metrics, Request, TokenLogprobs, Verified


@dataclass(eq=False, slots=True)
class Sequence:
    """Token history of a request, and its place in the engine.

    `tokens` is the truth: prompt and output. Keys and values of a prefix of it are in `entry`; what they
    miss is `pending`, one token while decoding, more while (re)computing a prompt. `leader` is the sequence
    that computes the same prompt, while it does. `matcher` follows the output, if a grammar binds it.
    """

    sequence_id: int
    request: Request
    detokenizer: Detokenizer | None
    matcher: Matcher | None = None
    clock: Callable[[], float] = time.monotonic
    leader: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    entry: KVEntry | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    tally: SpeculationTally = field(default_factory=SpeculationTally)
    steps: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    window: StreamingWindow | None = field(init=False)
    arrived: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    _emitted: int = 0
    _texts: list[str] = field(default_factory=list)
    _verified: Verified | None = None
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _told_prompt: int = 0
    restored: tuple[str, int] | None = None
    """The tier that KV came from for it, and how many of its tokens had KV on the device before."""
    last_token: float = 0.0
    """When its last delta with tokens was emitted."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.token_ids, *self.request.output]
        self.window = self.request.params.window
        if self.detokenizer is not None:
            for token in self.request.output:
                self.detokenizer.push(token)  # whoever gave these tokens to the client gave it their text
        self._emitted = len(self.tokens)
        self.arrived = self.clock()

    @property
    def kv(self) -> KVEntry:
        """The running entry. Only an admitted sequence has one."""
        if self.entry is None:
            raise EngineError(f"sequence {self.sequence_id} is not admitted")
        return self.entry

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.kv.length

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and len(self.tokens) > self.prompt_length

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids)

    @property
    def owes_prompt(self) -> bool:
        """Whether prompt tokens remain whose log probabilities were asked for."""
        # They are told with the first tokens: a resumed output has told them.
        wanted = self.request.params.prompt_logprobs is not None and not self.request.output
        return wanted and len(self.prompt_logprobs) < self.prompt_length - 1

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def room(self) -> int:
        """Tokens it may grow to: prompt and `max_tokens` (resolved when it entered)."""
        assert self.request.params.max_tokens is not None
        return self.prompt_length + self.request.params.max_tokens

    def kv_room(self, tokens: int) -> int:
        """Tokens held in KV, at most, while it grows to so many tokens."""
        needed = min(self.room, tokens)
        return needed if self.window is None else min(needed, self.window.ctx_size)

    @property
    def room_for_candidates(self) -> int:
        """None for the last token, it is drawn anyway; and none that a shift of the streaming window would separate
        from the tokens before them."""
        ends = self.room - 1 if self.window is None else min(self.room - 1, self.window.edge(len(self.tokens)))
        return ends - len(self.tokens)

    def extend(self, drawn: list[int], eos: frozenset[int]) -> int:
        """Append tokens in order until one of them ends the sequence. Returns how many were taken."""
        for taken, token in enumerate(drawn, start=1):
            self.tokens.append(token)
            if not self.first_token:
                self.first_token = self.clock()
            if self._ends_with(token, eos):
                return taken
        return len(drawn)

    def _ends_with(self, token: int, eos: frozenset[int]) -> bool:
        params = self.request.params
        if self.detokenizer is not None:
            self._texts.append(self.detokenizer.push(token))
        stopped = (token in eos and not params.ignore_eos) or token in params.stop_token_ids
        if self.matcher is not None:
            self.matcher.push(token)
            stopped = stopped or self.matcher.complete
        if stopped or (self.detokenizer is not None and self.detokenizer.stopped):
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.room or (self.matcher is not None and self.matcher.failed):
            self.finish_reason = FinishReason.LENGTH
        return self.finished

    def add_logprobs(self, found: list[TokenLogprobs]) -> None:
        """Of the tokens added last."""
        self._logprobs += found

    def note_verified(self, source: str, drafted: int, accepted: int) -> None:
        """Of the tokens added last, the first `accepted` were candidates."""
        self._verified = Verified(source, drafted, accepted, sum(map(len, self._texts[:accepted])))

    def take_delta(self) -> Delta:
        """What was added since the last call; with the metrics if the sequence ended."""
        new, text, verified = tuple(self.tokens[self._emitted :]), "".join(self._texts), self._verified
        logprobs, prompt = tuple(self._logprobs), tuple(self.prompt_logprobs[self._told_prompt :])
        self._emitted, self._verified, self._told_prompt = len(self.tokens), None, len(self.prompt_logprobs)
        self._texts.clear()
        self._logprobs.clear()
        if self.finished and self.detokenizer is not None:
            text += self.detokenizer.finish()
        metrics = self.metrics() if self.finished else None
        return Delta(new, text, self.finish_reason, metrics, self.request.index, logprobs, prompt, verified)

    def metrics(self) -> Metrics:
        prompt, now = self.prompt_length, self.clock()
        return Metrics(
            prompt_tokens=prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=len(self.tokens) - prompt,
            drafted=self.tally.drafted,
            accepted=self.tally.accepted,
            late=self.tally.late,
            steps=self.steps,
            queue_s=max(0.0, self.admitted - self.arrived),
            ttft_s=max(0.0, self.first_token - self.arrived),
            total_s=now - self.arrived,
            wasted=self.tally.wasted,
            sources=self.tally.sources(),
        )
