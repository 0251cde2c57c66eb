"""Requests, sampling parameters, outputs, finish reasons: plain frozen data, shared by every layer.

Everything here pickles, compares by value and checks its own invariants on construction. A wrong value
raises `InvalidRequest` with the name of the field, so that both front ends report it the same way.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from paceline.errors import InvalidRequest, PacelineError, by_code

MAX_SEED = 2**64 - 1
MAX_STOP_STRINGS = 16
GREEDY_BELOW = 1e-5
"""A lower temperature draws the likeliest token anyway, and dividing by it overflows."""


class FinishReason(StrEnum):
    """Why a sequence ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when drawing ends.

    `temperature` 0, or below 1e-5, is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. Filters apply in the order of
    Transformers: temperature, top-k, top-p, min-p. `seed` fixes the output for all time; None draws a
    fresh one, reported with the result. `max_tokens` None means up to the model's context. `stop` strings
    are not part of the text returned.
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

    def __post_init__(self) -> None:
        stop = _tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1)
        _check_number("temperature", self.temperature, low=0.0, high=100.0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_int("top_k", self.top_k, low=0)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, low=-(2**63), high=MAX_SEED)
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(stop)}", param="stop")
        if not all(isinstance(text, str) and text for text in stop):
            raise InvalidRequest("stop: each entry must be a non-empty string", param="stop")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, low=0)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed: the given one, or a fresh 63-bit one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, already tokenized. `session_id` names the KV cache it may reuse and will leave behind."""

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    session_id: str | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "token_ids", tuple(map(operator.index, self.token_ids)))
        except TypeError:
            raise InvalidRequest("prompt: token ids must be integers", param="prompt") from None
        if not self.token_ids:
            raise InvalidRequest("prompt: must hold at least one token", param="prompt")


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one request cost, in tokens, steps and seconds.

    `drafted` candidates were verified, `accepted` of them agreed. `late` counts the steps that wanted
    candidates and found none in time. `steps` counts the forward passes after the prompt was computed.
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

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time after the first; 0 for a single token."""
        decode_s = self.total_s - self.ttft_s
        return (self.completion_tokens - 1) / decode_s if self.completion_tokens > 1 and decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step adds to one request: at least one token, or the end, or both."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    metrics: Metrics | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class Accepted:
    """First frame of a stream that will produce deltas: the request was admitted by `replica_id`."""

    replica_id: str
    seed: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Last frame of a stream that could not go on. `code` is a `PacelineError.code`."""

    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: PacelineError) -> Failure:
        return cls(error.code, error.message, error.param, error.retry_after)

    def error(self) -> PacelineError:
        return by_code(self.code)(self.message, param=self.param, retry_after=self.retry_after)


Frame = Accepted | Delta | Failure
"""One item of the stream a target replica sends for one request: Accepted, then Deltas; or a Failure."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished generation, as `LLM.generate` returns it."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    seed: int
    metrics: Metrics = field(default_factory=Metrics)


Prompt = str | Sequence[int]


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
