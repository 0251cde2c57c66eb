"""Requests, sampling parameters, outputs, finish reasons: plain frozen data, shared by every layer.

Everything here pickles, compares by value and checks its own invariants on construction. A wrong value
raises `InvalidRequest` with the name of the field, so that both front ends report it the same way.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, get_args

from paceline.errors import InvalidRequest, PacelineError, by_code
from paceline.seeds import choice_seed
from paceline.sessions.window import DEFAULT_N_KEEP, HALF, StreamingWindow

MAX_SEED = 2**64 - 1
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_BIAS = 100.0
MAX_PRIORITY = 2**31 - 1
"""Either way from 0; what the wire holds."""
MAX_TOKENS = 2**31 - 1
"""Prompt and output of one request, where nothing else bounds them: positions are 32 bits on the wire."""
MAX_GRAMMAR = 128 << 10
"""Characters of a grammar."""
GREEDY_BELOW = 1e-5
"""A lower temperature draws the likeliest token anyway, and dividing by it overflows."""


class FinishReason(StrEnum):
    """Why a sequence ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


GrammarKind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must be a text of; it ends where the grammar lets it end.

    `source` is a JSON Schema as JSON text, a regular expression, or a grammar in llguidance's dialect of Lark, which
    may embed both. Equal grammars are compiled once (`paceline.speculation.grammar`, which says what of JSON Schema
    there is). `ends` are the ids that may be drawn where the text may end; an engine fills in its own.
    """

    kind: GrammarKind
    source: str
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            kinds = ", ".join(get_args(GrammarKind))
            raise InvalidRequest(f"grammar: must be one of {kinds}, got {self.kind!r}", param="grammar")
        if not isinstance(self.source, str):
            raise InvalidRequest(f"grammar: must be text, got {self.source!r}", param="grammar")
        if len(self.source) > MAX_GRAMMAR:
            raise InvalidRequest(f"grammar: at most {MAX_GRAMMAR} characters, got {len(self.source)}", param="grammar")
        object.__setattr__(self, "ends", _tuple("grammar", self.ends))
        for token in self.ends:
            _check_int("grammar", token, low=0)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and from how much of the text, how many outputs there are, when each ends, what is told.

    `temperature` 0, or below 1e-5, is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` fixes the output
    for all time; None draws a fresh one, reported with the result. `n` outputs of one prompt are drawn from
    seeds of their own (`paceline.seeds.choice_seed`).

    Logits are changed in this order: ids that would end the output get -inf until there are `min_tokens`;
    `logit_bias` (token id to a bias in [-100, 100]) is added; `repetition_penalty` divides positive and
    multiplies negative logits of tokens in the prompt or the output (Transformers' and vLLM's meaning, 1 is
    off); `frequency_penalty` for each time, `presence_penalty` once, are subtracted for tokens in the output
    (OpenAI's and vLLM's meaning, 0 is off). Then temperature, top-k, top-p, min-p, in Transformers' order.

    `max_tokens` None means up to the model's context. `stop` strings are not part of the text returned unless
    `include_stop_str_in_output`. `logprobs` reports that many likeliest tokens (0 to 20) beside each token of
    the output, from the model's own distribution before anything above; `prompt_logprobs` the same for the
    prompt, which is then computed anew.

    With a `ctx_size` the text has no bound: the model sees its first `n_keep` tokens and the latest, `ctx_size` in
    all at most, and drops `n_discard` of them at a time (`paceline.sessions.window`; -1 is half of those behind the
    first). 0 is off. None is what the engine is set to.

    `shown_token_ids` are special tokens that the text shows as they are spelled; all others are left out of it.

    With a `grammar`, tokens that no text of it goes on with get -inf, after bias and penalties and before temperature
    and filters. Its text ends the output where it is complete and cannot go on, and where an end of the model's is
    drawn, which it may be wherever the text may end, with `ignore_eos` too; both are finish reason "stop". Where
    `min_tokens` and the grammar leave nothing, the grammar wins. A text that does not end by itself ends at
    `max_tokens`, as all do, and is not whole then.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    ctx_size: int | None = None
    n_keep: int | None = None
    n_discard: int | None = None
    grammar: Grammar | None = None
    shown_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        stop = _tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        self._check_drawing()
        self._check_ending()
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low=0, high=MAX_LOGPROBS)
        _check_int("n", self.n, low=1, high=MAX_CHOICES)
        for name, low in (("ctx_size", 0), ("n_keep", 0), ("n_discard", HALF)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low=low, high=MAX_TOKENS)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequest(f"grammar: must be a Grammar, got {self.grammar!r}", param="grammar")
        _ = self.window  # raises if the three do not fit each other

    def _check_drawing(self) -> None:
        _check_number("temperature", self.temperature, low=0.0, high=100.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_int("top_k", self.top_k, low=0)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, low=-(2**63), high=MAX_SEED)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)

    def _check_ending(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", param="stop")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest("stop: each entry must be a non-empty string", param="stop")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, low=0)
        _check_int("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens: {self.min_tokens} is more than max_tokens, which is {self.max_tokens}", param="min_tokens"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed: the given one, or a fresh 63-bit one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    @property
    def window(self) -> StreamingWindow | None:
        """The streaming window, if these parameters set one."""
        if not self.ctx_size:
            return None
        n_keep = DEFAULT_N_KEEP if self.n_keep is None else self.n_keep
        return StreamingWindow(self.ctx_size, n_keep, HALF if self.n_discard is None else self.n_discard)

    @property
    def adjusts(self) -> bool:
        """Whether logits depend on more than temperature, filters and grammar: a bias, or the tokens before."""
        return bool(self.logit_bias or self.min_tokens) or self.penalizes

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def bias(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return dict(self.logit_bias)

    def choice(self, index: int) -> SamplingParams:
        """The parameters of output `index` of n: a seed of its own, and the prompt is reported once."""
        if index == 0:
            return self
        seed = self.seed if self.seed is None else choice_seed(self.seed, index)
        return replace(self, seed=seed, prompt_logprobs=None)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, already tokenized. `session_id` names the KV cache it may reuse and will leave behind.

    An engine takes one output at a time: `choices` gives the n requests that one with n > 1 stands for.
    `index` is the output's place among them; `follows` names the request whose prompt is the same and is
    computed first. A lower `priority` goes first and may take the place of running requests of a higher one;
    equals go in the order of arrival.

    A request whose replica was lost goes on at another: `resumed` has, for each of the n outputs, the tokens the
    client was given already, or None if it had ended; it is empty for a request that begins. The engine takes
    them for output of its own: seeds, penalties, stop strings and limits come out as if nothing had happened.
    `avoid` names the replicas that were lost or failed, so that routing looks elsewhere.

    `trace` is the traceparent (W3C Trace Context) of whoever handed the request on, "" of nobody; it changes nothing.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    session_id: str | None = None
    speculate: bool = True
    index: int = 0
    follows: str | None = None
    priority: int = 0
    resumed: tuple[tuple[int, ...] | None, ...] = ()
    avoid: tuple[str, ...] = ()
    trace: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "token_ids", tuple(map(operator.index, self.token_ids)))
        except TypeError:
            raise InvalidRequest("prompt: token ids must be integers", param="prompt") from None
        if not self.token_ids:
            raise InvalidRequest("prompt: must hold at least one token", param="prompt")
        if len(self.resumed) not in (0, self.params.n):
            raise InvalidRequest(f"resumed: {len(self.resumed)} outputs of {self.params.n}", param="resumed")
        _check_int("priority", self.priority, low=-MAX_PRIORITY, high=MAX_PRIORITY)

    def within(self, trace: str) -> Request:
        """The same request, handed on by somebody else."""
        return self if trace == self.trace else replace(self, trace=trace)

    @property
    def output(self) -> tuple[int, ...]:
        """What this output consists of already; nothing unless it is resumed."""
        return (self.resumed[self.index] or ()) if self.resumed else ()

    def choices(self) -> tuple[Request, ...]:
        """One request for each output that has not ended: the first under this id and session, the others beside
        it, without one.

        The seed must be fixed if there are several.
        """
        params, (first, *others) = self.params, choice_ids(self.request_id, self.params.n)
        assert params.n == 1 or params.seed is not None, "a seed is fixed where a request enters"
        rest = (
            replace(self, request_id=name, params=params.choice(index), session_id=None, index=index, follows=first)
            for index, name in enumerate(others, start=1)
        )
        ended = {index for index, output in enumerate(self.resumed) if output is None}
        return tuple(each for each in (self, *rest) if each.index not in ended)


def choice_ids(request_id: str, n: int) -> list[str]:
    """The ids under which the n outputs of a request run."""
    return [request_id, *(f"{request_id}/{index}" for index in range(1, n))]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token: natural logarithms of the unprocessed distribution at its position.

    `rank` is 1 for the likeliest. `top` holds the likeliest tokens, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    def cut(self, count: int) -> TokenLogprobs:
        """With so many likeliest tokens, at most."""
        return self if len(self.top) <= count else replace(self, top=self.top[:count])


@dataclass(frozen=True, slots=True)
class SourceMetrics:
    """What one source of candidates (`paceline.speculation.proposer.Source`) contributed.

    `drafted[i]` candidates at place i of their run were verified, `accepted[i]` of them became output. The others
    were rolled back: refused, behind a refused one, or behind the end of the output. `wasted` ones were never verified.
    """

    source: str
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    wasted: int = 0

    @property
    def rolled_back(self) -> int:
        return sum(self.drafted) - sum(self.accepted)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one request cost, in tokens, steps and seconds.

    `drafted` candidates were verified, `accepted` became output; `sources` says whose they were and where. `wasted`
    ones came in time and were not verified, because the step had no room. `late` counts the steps that wanted
    candidates and found none in time. `steps` counts the forward passes after the prompt was computed.

    `resumptions` counts the replicas that were lost on the way. Tokens and seconds are those of the whole request
    then; candidates, steps and `cached_tokens` those of the last replica, the others took theirs with them.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    late: int = 0
    steps: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    wasted: int = 0
    sources: tuple[SourceMetrics, ...] = ()
    resumptions: int = 0

    @property
    def rolled_back(self) -> int:
        """Verified in vain."""
        return self.drafted - self.accepted

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time after the first; 0 for a single token."""
        decode_s = self.total_s - self.ttft_s
        return (self.completion_tokens - 1) / decode_s if self.completion_tokens > 1 and decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of the candidates of one step: `drafted` of `source` were verified, and the first `accepted` tokens
    of the delta, with the first `chars` characters of its text, are those that stood."""

    source: str
    drafted: int
    accepted: int
    chars: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step adds to one output of a request: at least one token, or the end, or both.

    `index` says which output. `logprobs`, if asked for, has an entry for each of `token_ids`;
    `prompt_logprobs` comes once, with the first tokens, and has an entry for each prompt token but the first.
    `verified` is None in a step without candidates.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    metrics: Metrics | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    verified: Verified | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class FeedAddress:
    """Where a router gets the frames of all its requests to one replica (`paceline.rpc.frame_feed`)."""

    address: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Accepted:
    """First frame of a stream that will produce deltas: the request was admitted by `replica_id`.

    `route` is a word for why it went there (`paceline.sessions.placement.Reason`), "" if nobody chose. The replica
    has a `feed`, if it names one; `fed` says that the deltas of this request go there.
    """

    replica_id: str
    seed: int
    prompt_tokens: int
    route: str = ""
    feed: FeedAddress | None = None
    fed: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Last frame of a stream that could not go on. `code` is a `PacelineError.code`."""

    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    replica_id: str | None = None

    @classmethod
    def of(cls, error: PacelineError, replica_id: str | None = None) -> Failure:
        return cls(error.code, error.message, error.param, error.retry_after, replica_id)

    def error(self) -> PacelineError:
        return by_code(self.code)(self.message, param=self.param, retry_after=self.retry_after)


Frame = Accepted | Delta | Failure
"""One item of the stream a target replica sends for one request: Accepted, then Deltas; or a Failure."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the n outputs of a request. `logprobs` has an entry for each token if they were asked for."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seed: int
    metrics: Metrics = field(default_factory=Metrics)
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished generation, as `LLM.generate` returns it: `outputs`, and the first of them by its own names.

    `prompt_logprobs`, if asked for, has an entry for each prompt token; the first is None, nothing predicts it.
    """

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def seed(self) -> int:
        return self.outputs[0].seed

    @property
    def metrics(self) -> Metrics:
        return self.outputs[0].metrics

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs


Prompt = str | Sequence[int]


def _bias_pairs(bias: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Sorted pairs of token id and bias, so that equal parameters compare and hash equal."""
    if not isinstance(bias, Mapping | tuple | list):
        raise InvalidRequest(f"logit_bias: must map token ids to numbers, got {bias!r}", param="logit_bias")
    pairs = list(bias.items() if isinstance(bias, Mapping) else bias)
    for token, value in pairs:
        _check_int("logit_bias", token, low=0)
        _check_number("logit_bias", value, low=-MAX_BIAS, high=MAX_BIAS)
    return tuple(sorted((token, float(value)) for token, value in pairs))


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise InvalidRequest(f"{name}: must be a list, got {value!r}", param=name) from None


def _check_int(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name}: must be an integer, got {value!r}", param=name)
    if low is not None and value < low:
        raise InvalidRequest(f"{name}: must be at least {low}, got {value}", param=name)
    if high is not None and value > high:
        raise InvalidRequest(f"{name}: must be at most {high}, got {value}", param=name)


def _check_number(name: str, value: Any, *, low: float, high: float, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: must be a number, got {value!r}", param=name)
    if not (low <= value <= high) or (low_open and value == low):
        bound = "above" if low_open else "at least"
        raise InvalidRequest(f"{name}: must be {bound} {low:g} and at most {high:g}, got {value}", param=name)
