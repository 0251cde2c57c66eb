"""What a drafter does before anybody asks: everything once, so that no target waits for a kernel to be compiled."""

from __future__ import annotations

from paceline.engine.drafter import Drafter
from paceline.types import SamplingParams

PROMPT, DEPTH = 16, 4
TOGETHER = (1, 4)
"""Sequences at once."""
MOST_STEPS = 64


def rehearse(drafter: Drafter) -> None:
    """Draft for a few made-up sequences, forget them, and count nothing of it.

    The first candidates of a drafter on a GPU take a second or more, in which its target gives up on it and learns that
    it is slow.
    """
    for count in TOGETHER:
        for key in range(count):
            drafter.open(key, [0] * PROMPT, SamplingParams(seed=key), DEPTH)
        for _ in range(MOST_STEPS):
            if not drafter.has_work:
                break
            drafter.step()
        for key in range(count):
            drafter.close(key)
    drafter.kv.evict(drafter.kv.usage().total)
    drafter.drafted_tokens = drafter.rolled_back_tokens = drafter.passes = 0
