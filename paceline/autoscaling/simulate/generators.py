"""Made-up arrivals: steady, in bursts, over a day. Lengths are lognormal, with the mean and spread of Azure's traces.

AzureLLMInferenceTrace_conv.csv (2023): prompts of 1155 tokens on average, outputs of 211, logarithms with a standard
deviation of 0.99 and 0.86.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng

from paceline.autoscaling.simulate.traces import Array, Arrivals, Requests, shape
from paceline.errors import ConfigError

PROMPT, PROMPT_SIGMA = 1155.0, 0.99
OUTPUT, OUTPUT_SIGMA = 211.0, 0.86
LONGEST = 20.0
"""Lengths are cut at so many times their mean."""
FEW = 3_000_000
"""Up to so many requests each is drawn; of more, only the sums of each tick."""

RISE_S = 30.0


@dataclass(frozen=True)
class Sessions:
    """`follows` of the requests continue a session; it holds `cached` of their prompts."""

    follows: float = 0.5
    cached: float = 0.6


def generate(
    kind: str, rate: float, hours: float, seed: int, tick: float, sessions: Sessions | None = None
) -> Arrivals:
    """Arrivals of a kind, `rate` requests a second on average. Raises ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"trace: {kind}: no such file, nor one of {', '.join(KINDS)}", param="trace")
    rng = default_rng(seed)
    count = max(1, math.ceil(hours * 3600 / tick))
    per_tick = np.maximum(KINDS[kind](count, tick, rng), 0.0)
    per_tick *= rate * tick / per_tick.mean()
    requests = rng.poisson(per_tick).astype(float)
    sessions = sessions or Sessions()
    if requests.sum() <= FEW:
        return _drawn(requests, tick, rng, sessions).ticks(tick, kind, count * tick)
    return _summed(requests, tick, kind, rng, sessions)


def _drawn(requests: Array, tick: float, rng: Generator, sessions: Sessions) -> Requests:
    n = int(requests.sum())
    t = np.sort((np.repeat(np.arange(len(requests)), requests.astype(np.int64)) + rng.random(n)) * tick)
    prompt, output = _lengths(rng, PROMPT, PROMPT_SIGMA, n), _lengths(rng, OUTPUT, OUTPUT_SIGMA, n)
    follows = rng.random(n) < sessions.follows
    return Requests(t, prompt, output, np.where(follows, np.floor(sessions.cached * prompt), 0.0), follows)


def _lengths(rng: Generator, mean: float, sigma: float, n: int) -> Array:
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, n)
    return np.ceil(np.minimum(drawn, LONGEST * mean))


def _summed(requests: Array, tick: float, name: str, rng: Generator, sessions: Sessions) -> Arrivals:
    """Sums of many lengths are normal."""

    def sums(mean: float, sigma: float) -> Array:
        spread = mean * math.sqrt(math.expm1(sigma**2))
        return np.asarray(np.maximum(rng.normal(mean * requests, spread * np.sqrt(requests)), requests))

    prompt, output = sums(PROMPT, PROMPT_SIGMA), sums(OUTPUT, OUTPUT_SIGMA)
    follows = rng.binomial(requests.astype(np.int64), sessions.follows).astype(float)
    share = np.divide(follows, requests, out=np.zeros_like(follows), where=requests > 0)
    lengths = shape(_lengths(default_rng(0), PROMPT, PROMPT_SIGMA, 1 << 14))
    return Arrivals(
        name=name,
        tick=tick,
        requests=requests,
        prompt=prompt,
        output=output,
        follows=follows,
        follow_prompt=share * prompt,
        follow_cached=share * prompt * sessions.cached,
        shape=lengths,
    )


def poisson(count: int, _tick: float, _rng: Generator) -> Array:
    """The same rate all the time."""
    return np.ones(count)


def bursts(count: int, tick: float, rng: Generator) -> Array:
    """A rate that switches (a Markov-modulated Poisson process): quiet for 10 minutes on average, then 1.5 to 3 times
    as much for 5; and every hour or so a spike of two minutes, 4 times the quiet rate. Either comes up in 30 seconds.
    """
    rate = np.ones(count)
    at = 0.0
    while at < count * tick:
        quiet, loud = rng.exponential(600.0), rng.exponential(300.0)
        rate[_span(at + quiet, at + quiet + loud, tick)] = rng.uniform(1.5, 3.0)
        at += quiet + loud
    for spike in np.cumsum(rng.exponential(3600.0, 2 + int(count * tick / 1800))):
        rate[_span(spike, spike + 120.0, tick)] = 4.0
    rise = max(1, round(RISE_S / tick))
    return np.convolve(np.pad(rate, (rise - 1, 0), mode="edge"), np.ones(rise) / rise, mode="valid")


def diurnal(count: int, tick: float, rng: Generator) -> Array:
    """A day: least at 4, most in the afternoon, peaks at 10 and 20, and noise that lasts for minutes."""
    hour = (np.arange(count) * tick / 3600.0) % 24
    day = 0.35 + 0.65 * (0.5 - 0.5 * np.cos(2 * np.pi * (hour - 4) / 24)) ** 1.5
    for peak, height, width in ((10.0, 0.25, 0.7), (20.0, 0.35, 1.0)):
        day += height * np.exp(-0.5 * ((hour - peak) / width) ** 2)
    keep = math.exp(-tick / 300.0)
    pushes = rng.normal(0.0, 0.08 * math.sqrt(1 - keep**2), count)
    noise, level = np.empty(count), 0.0
    for n, push in enumerate(pushes):
        level = keep * level + push
        noise[n] = level
    return np.asarray(day * np.exp(noise))


def _span(begin: float, end: float, tick: float) -> slice:
    return slice(int(begin / tick), math.ceil(end / tick))


KINDS: dict[str, Callable[[int, float, Generator], Array]] = {"poisson": poisson, "bursts": bursts, "diurnal": diurnal}
