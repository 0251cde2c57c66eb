"""Synthetic acceptance: candidates stand with a given probability, whatever they are. For benchmarks only.

It tells the speed of the system from the quality of a draft. The text that comes out is nonsense.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.engine.sampling import Draws
from paceline.engine.scheduler import Scheduled
from paceline.seeds import GOLDEN, mix

_DOMAIN = 0x5E97A6C1D1B54A33


def accept(step: list[Scheduled], drawn: list[Draws], probability: float) -> list[Draws]:
    """What each member of the step commits: candidates up to the first refusal, then the target's likeliest token.

    Whether a position's candidate stands is a pure function of the request's seed and the position.
    """
    return [
        _accept(part, draws, probability) if part.candidates else draws for part, draws in zip(step, drawn, strict=True)
    ]


def _accept(part: Scheduled, draws: Draws, probability: float) -> Draws:
    seed, base = part.sequence.request.params.seed or 0, len(part.sequence.tokens)
    accepted = 0
    while accepted < len(part.candidates) and _uniform(seed, base + accepted) < probability:
        accepted += 1
    # As under the real rules, a refused candidate is never what follows.
    own, second = draws.logits[accepted].topk(2).indices.tolist()
    if accepted < len(part.candidates) and own == part.candidates[accepted]:
        own = second
    return replace(draws, tokens=[*part.candidates[:accepted], own], accepted=accepted)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1)."""
    return mix(mix(seed ^ _DOMAIN) + position * GOLDEN) / 2.0**64
