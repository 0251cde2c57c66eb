"""The engine: requests in, tokens out, a step at a time. No Ray, no gRPC, no threads."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from paceline.config import SpeculationSettings
from paceline.engine import synthetic
from paceline.engine.backlog import Backlog
from paceline.engine.detokenizer import Decoder, Detokenizer, without_wrapping
from paceline.engine.flight import Flight
from paceline.engine.kv_cache import KVCache
from paceline.engine.kv_entry import SessionKV
from paceline.engine.meters import EngineMeter
from paceline.engine.restores import Restores
from paceline.engine.runner import Runner
from paceline.engine.sampling import Draws
from paceline.engine.scheduler import Scheduled, Scheduler
from paceline.engine.sequence import Sequence
from paceline.engine.telemetry import EngineTelemetry, Phase
from paceline.errors import InvalidRequest, ModelError, Overloaded
from paceline.sessions.rules import WindowRules
from paceline.sessions.window import DEFAULT_N_KEEP, HALF
from paceline.speculation.grammar import Grammars, Matcher
from paceline.speculation.proposer import Proposal, Wanted
from paceline.speculation.speculator import Outcome, Speculator
from paceline.speculation.telemetry import SpeculationTally
from paceline.types import Delta, FinishReason, Request

logger = logging.getLogger(__name__)

PAUSE_S = 0.01
"""A step in which nothing can run, since KV is on its way, takes so long at most: new requests may come meanwhile."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine takes on, resolved: no "auto" left."""

    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    max_queued_requests: int
    max_prefill_while_decoding: int | None = None
    """Prompt tokens in a step in which a stream runs; None is up to `max_batched_tokens`."""
    ctx_size: int | None = None
    """The streaming window of requests that name none, with `n_keep` and `n_discard`; None is none."""
    n_keep: int = DEFAULT_N_KEEP
    n_discard: int = HALF
    max_queued_prefill_tokens: int | None = None
    """Prompt tokens of waiting requests; None is up to `max_queued_prefill_s`."""
    max_queued_prefill_s: float | None = None
    """The same in seconds, at the pace measured, but at least two longest prompts; None is no bound."""


class Engine:
    """Continuous batching over one model, with candidates from a speculator if there is one.

    `step` is the whole life of a batch. The caller owns the thread; nothing here is locked.
    """

    def __init__(
        self,
        runner: Runner,
        kv: KVCache,
        limits: EngineLimits,
        *,
        eos: frozenset[int] = frozenset(),
        decoder: Decoder | None = None,
        speculator: Speculator | None = None,
        speculation: SpeculationSettings | None = None,
        restores: Restores | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if runner.columns is not None:
            raise ModelError("a draft over a part of its target's vocabulary is no target: it cannot say the rest")
        self.kv = kv
        self.limits = limits
        self.speculator = speculator
        self._runner = runner
        self.grammars = grammars
        """Compiles what requests bring; None if the tokenizer is not known."""
        self._eos, self._ends = eos, tuple(sorted(eos))
        self._decoder = None if decoder is None else without_wrapping(decoder)
        speculation = speculation or SpeculationSettings()
        self._verification = speculation.verification
        self.synthetic_acceptance = speculation.synthetic_acceptance
        """The probability with which each candidate is accepted, whatever it is; None: by the rule, as it should be."""
        self._scheduler = Scheduler(
            kv,
            limits.max_num_seqs,
            limits.max_batched_tokens,
            limits.max_prefill_while_decoding,
            restores,
            Backlog(limits.max_queued_prefill_tokens, limits.max_queued_prefill_s, 2 * limits.max_model_len),
        )
        self.restores = restores
        self._flight: Flight | None = None
        self._ids = itertools.count(1)
        self._by_request: dict[str, Sequence] = {}
        self._windows = WindowRules(
            largest=min(limits.max_model_len, kv.usage().total),
            ctx_size=limits.ctx_size,
            n_keep=limits.n_keep,
            n_discard=limits.n_discard,
            refusal=kv.shift_refusal,
        )
        self.tally = SpeculationTally()
        """What became of candidates, of all sequences since the start."""
        self.telemetry = EngineTelemetry(clock)
        self.meter = EngineMeter(self)

    @property
    def has_work(self) -> bool:
        return bool(self._by_request)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens of waiting requests, less those whose KV was held when they came."""
        return self._scheduler.backlog.tokens

    @property
    def missing_tokens(self) -> int:
        """Tokens that running sequences have to compute before they can go on. Any thread may ask."""
        held = ((len(each.tokens), each.entry) for each in list(self._scheduler.running))
        missing = (tokens - (entry.length if entry is not None else 0) for tokens, entry in held)
        return sum(tokens for tokens in missing if tokens > 1)

    @property
    def prefill_seconds_per_token(self) -> float | None:
        """As measured lately; None before the first prompt."""
        return self._scheduler.backlog.pace.seconds_per_token

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest if it can never run here, Overloaded if the queue is full."""
        self.add_all((request,))

    def add_all(self, requests: tuple[Request, ...]) -> None:
        """Queue the outputs of one request (`Request.choices`), or none of them. Raises as `add` does.

        The first computes the prompt; the others wait for it and take its KV over.
        """
        resolved = [self._resolve(request) for request in requests]
        self._check_room(len(requests), resolved[0])
        for request in resolved:
            if request.request_id in self._by_request:
                raise InvalidRequest(f"request_id: {request.request_id!r} is in use", param="request_id")
        matchers = {request.request_id: self._matcher(request) for request in resolved}
        queued = self.queued_prefill_tokens
        for request in resolved:
            leader = self._by_request.get(request.follows) if request.follows is not None else None
            detokenizer, matcher = self._detokenizer(request), matchers[request.request_id]
            number, clock = next(self._ids), self.telemetry.clock
            sequence = Sequence(number, request, detokenizer, matcher, clock, leader)
            self._by_request[request.request_id] = sequence
            self._scheduler.add(sequence)
        self.meter.arrived(self.queued_prefill_tokens - queued)

    def abort(self, request_id: str) -> Delta | None:
        """End a request now, freeing everything it holds. Its last delta, or None if it is not here."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return None
        sequence.finish_reason = FinishReason.ABORT
        self.telemetry.aborted()
        self._retire(sequence)
        self.meter.look()
        return sequence.take_delta()

    def step(self) -> dict[str, Delta]:
        """One forward pass for everything that can run, and the next begun if it can be. Returns what each request
        gained."""
        times = self.telemetry.step
        times.begin()
        flight = self._flight or self._begin()
        if flight is None:
            if self.restores is not None:
                self.restores.wait(PAUSE_S)
            return {}
        self._flight = flight.begin_next(self._runner, self._scheduler) if self.speculator is None else None
        tokens = flight.wait()
        times.lap(Phase.FORWARD)
        step, drawn = flight.landed(tokens, self._verification)
        if self.synthetic_acceptance is not None:
            drawn = synthetic.accept(step, drawn, self.synthetic_acceptance)
        times.lap(Phase.SAMPLE)
        deltas = self._emit(self._commit(step, drawn))
        times.lap(Phase.EMIT)
        self._note_step(step)
        return deltas

    def sessions(self) -> list[SessionKV]:
        """Sessions whose KV is held, each where it is soonest at hand: those on disk, in host memory, then here."""
        size = self.kv.bytes_per_token
        here = [
            SessionKV(name, tokens, running, size * tokens) for name, (tokens, running) in self.kv.sessions().items()
        ]
        below = self.restores.tiers.sessions() if self.restores is not None else []
        named = {each.session_id for each in here}
        return [*(each for each in below if each.session_id not in named), *here]

    def drop_session(self, session_id: str) -> bool:
        """Drop a session's idle KV, wherever it is. Whether there was any."""
        below = self.restores is not None and self.restores.tiers.drop(session_id)
        return self.kv.drop_session(session_id) or below

    def close(self, timeout_s: float) -> None:
        """After the last step: idle sessions go to disk if there is a disk tier, as far as there is time."""
        if self.restores is None:
            return
        if self.restores.tiers.has_files:
            usage = self.kv.usage()
            self.kv.evict(usage.total - usage.in_use)
        if not self.restores.tiers.stop(timeout_s):
            logger.warning("not every session's KV was written to disk in %g s", timeout_s)

    def check(self) -> None:
        """Raise EngineError unless every account closes. For idle times and tests."""
        self.kv.check()
        self._scheduler.check()

    def _begin(self) -> Flight | None:
        """The next step, under way; None if nothing can run."""
        times = self.telemetry.step
        self._admit()
        times.lap(Phase.SCHEDULE)
        proposals = self._propose()
        times.lap(Phase.PROPOSE)
        step = self._scheduler.schedule(proposals)
        times.lap(Phase.SCHEDULE)
        return Flight.begin(self._runner, step, self._verification) if step else None

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            self.telemetry.admitted(sequence)
            self.tally.requests += 1
            self.tally.declined += not sequence.request.speculate
            if self.speculator is not None and sequence.request.speculate:
                self.speculator.open(
                    sequence.sequence_id,
                    sequence.tokens,
                    sequence.request.params,
                    sequence.prompt_length,
                    trace=sequence.request.trace,
                )

    def _propose(self) -> Mapping[int, Proposal]:
        if self.speculator is None:
            return {}
        decoding = [sequence for sequence in self._scheduler.running if sequence.decoding]
        wanted = [Wanted(each.sequence_id, len(each.tokens), _candidates_for(each)) for each in decoding]
        proposed = self.speculator.propose(wanted, self._scheduler.prefill_ahead())
        for sequence in decoding:
            sequence.tally.late += sequence.sequence_id in proposed.late
        self.tally.late += len(proposed.late)
        matchers = {each.sequence_id: each.matcher for each in decoding}
        return {name: self._known(proposal, matchers[name]) for name, proposal in proposed.found.items()}

    def _known(self, proposal: Proposal, matcher: Matcher | None) -> Proposal:
        """Candidates up to the first that is no id of this model, as a drafter's vocabulary may be larger, or that the
        sequence's grammar refuses.

        Its distribution stays: under rejection sampling it is a candidate that is refused.
        """
        vocab = self._runner.vocab_size
        known = sum(1 for _ in itertools.takewhile(lambda token: 0 <= token < vocab, proposal.tokens))
        if matcher is not None:
            known = matcher.admits(proposal.tokens[:known])
        return replace(proposal, tokens=proposal.tokens[:known], probs=proposal.probs[: known + 1])

    def _commit(self, step: list[Scheduled], drawn: list[Draws]) -> list[Sequence]:
        """Accept the longest agreeing run, keep its KV, drop the rest; tell the speculator."""
        committed, outcomes, prefilled = [], [], 0
        for part, draws in zip(step, drawn, strict=True):
            sequence, base, decoding = part.sequence, len(part.sequence.tokens), part.sequence.decoding
            sequence.steps += decoding
            self.tally.steps += decoding
            prefilled += 0 if decoding else len(part.window.token_ids)
            self.kv.append(sequence.kv, part.window.token_ids)
            if not draws.tokens:
                continue
            self._take(part, draws)
            committed.append(sequence)
            if self.speculator is not None:
                room, new = max(0, _candidates_for(sequence)), tuple(sequence.tokens[base:])
                outcomes.append(Outcome(sequence.sequence_id, base, new, part.draws, room, decoding, sequence.finished))
        if self.speculator is not None:
            self.speculator.commit(outcomes, prefilled, self._scheduler.prefill_ahead())
        return committed

    def _take(self, part: Scheduled, draws: Draws) -> None:
        sequence, base = part.sequence, len(part.sequence.tokens)
        taken = sequence.extend(draws.tokens, self._eos)
        draws.note_logprobs(part, taken)
        kept = min(draws.accepted, taken)
        if kept < len(part.candidates):
            self.kv.truncate(sequence.kv, base + kept)
        if part.proposal is not None and part.candidates:
            sequence.note_verified(part.proposal.source, len(part.candidates), kept)
            self.telemetry.verified(part.proposal.source, len(part.candidates))
        for tally in (sequence.tally, self.tally):
            if part.proposal is not None:
                tally.waste(part.proposal.source, part.unused)
                tally.note(part.proposal.source, len(part.candidates), kept)

    def _emit(self, committed: list[Sequence]) -> dict[str, Delta]:
        deltas, now = {}, self.telemetry.clock()
        for sequence in committed:
            if sequence.finished:
                self._retire(sequence)
            delta = deltas[sequence.request.request_id] = sequence.take_delta()
            self.meter.emitted(sequence, len(delta.token_ids), now)
            self.telemetry.gained(sequence, len(delta.token_ids), now)
        return deltas

    def _retire(self, sequence: Sequence) -> None:
        del self._by_request[sequence.request.request_id]
        if self.speculator is not None and sequence.request.speculate and sequence.admitted:
            self.speculator.close(sequence.sequence_id)
        self._scheduler.remove(sequence)

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        if self._decoder is None:
            return None
        params = request.params
        return Detokenizer(
            self._decoder,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            shown=params.shown_token_ids,
        )

    def _matcher(self, request: Request) -> Matcher | None:
        """Raises InvalidRequest if its grammar cannot be compiled, or its output so far is no text of it."""
        grammar = request.params.grammar
        if grammar is None:
            return None
        if self.grammars is None:
            raise InvalidRequest("grammar: this model's tokenizer is not one that grammars need", param="grammar")
        matcher = self.grammars.matcher(grammar, request.output)
        if matcher.failed:
            raise InvalidRequest("resumed: no text of the grammar begins like this", param="resumed")
        return matcher

    def _note_step(self, step: list[Scheduled]) -> None:
        """What else the step did counts for its prompts: it is the pace they have beside the streams."""
        times = self.telemetry.step
        times.end()
        self.meter.stepped(times.elapsed)
        self.telemetry.step_tokens.note(sum(len(part.window.token_ids) for part in step))
        tokens, seconds = sum(part.prompt_tokens for part in step), times.elapsed
        if tokens:
            self._scheduler.backlog.pace.note(tokens, seconds)
        if self.restores is not None:
            self.restores.note_prefill(tokens, seconds)

    def _check_room(self, outputs: int, request: Request) -> None:
        """Whether that many more may wait, with the prompt of `request`. Raises Overloaded with the seconds until
        there should be room."""
        backlog = self._scheduler.backlog
        limit = min(self.limits.max_num_seqs, self.limits.max_queued_requests)
        if outputs > max(1, limit):
            raise InvalidRequest(f"n: at most {limit} outputs at once here, got {outputs}", param="n")
        if self.num_waiting + outputs > self.limits.max_queued_requests:
            first = backlog.tokens // max(1, self.num_waiting) + self._scheduler.missing_tokens
            raise Overloaded(
                f"{self.num_waiting} requests are waiting already; try again shortly", retry_after=backlog.wait_s(first)
            )
        if not self.num_waiting or backlog.bound is None:
            return
        held = self.kv.match(request.token_ids, request.session_id, request.params.window)
        backlog.check_room(len(request.token_ids) - held, self._scheduler.missing_tokens)

    def _resolve(self, request: Request) -> Request:
        """Fill in the window, `max_tokens`, the seed, the ids that `min_tokens` masks and those that may end a text of
        the grammar; refuse what cannot fit."""
        prompt = len(request.token_ids)
        self._check_ids("prompt", request.token_ids)
        self._check_ids("resumed", request.output)
        self._check_ids("logit_bias", request.params.bias)
        params = self._windows.resolve(request.params)
        limit, max_tokens = self._windows.longest(params), params.max_tokens
        if prompt >= limit:
            raise InvalidRequest(f"prompt: {prompt} tokens do not fit the context of {limit}", param="prompt")
        if max_tokens is not None and prompt + max_tokens > limit:
            raise InvalidRequest(
                f"max_tokens: {prompt} prompt tokens and {max_tokens} more exceed the context of {limit}; "
                f"at most {limit - prompt} fit",
                param="max_tokens",
            )
        params = replace(params.with_seed(), max_tokens=max_tokens or limit - prompt)
        if len(request.output) >= (max_tokens or limit - prompt):
            raise InvalidRequest(f"resumed: {len(request.output)} tokens leave no room for more", param="resumed")
        if params.min_tokens and not params.ignore_eos:
            # The drafter masks the same ids, and its model's own EOS may differ.
            params = replace(params, stop_token_ids=tuple(sorted(self._eos.union(params.stop_token_ids))))
        if params.grammar is not None:
            # Synthetic acceptance commits any candidate: under a grammar it would end at the first.
            within = None if self.synthetic_acceptance is not None else replace(params.grammar, ends=self._ends)
            params = replace(params, grammar=within)
        return replace(request, params=params)

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        vocab = self._runner.vocab_size
        if not all(0 <= token < vocab for token in token_ids):
            raise InvalidRequest(f"{name}: token ids must be in [0, {vocab})", param=name)


def _candidates_for(sequence: Sequence) -> int:
    return sequence.room_for_candidates if sequence.request.speculate else 0
