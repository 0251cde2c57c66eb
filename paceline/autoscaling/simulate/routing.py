"""Requests go to the least loaded."""

from __future__ import annotations

import numpy as np

from paceline.autoscaling.simulate.profile import Array

ROUNDS = 12
LITTLE = 1e-9
"""Not worth sharing out."""


def level_out(load: Array, amount: float, room: Array) -> Array:
    """How `amount` is shared out so that those who get some end at one level, none above its room; an infinite load
    gets nothing. There has to be room for it all.
    """
    if amount <= LITTLE:
        given = np.zeros(len(load))
        given[np.argmin(load)] = max(amount, 0.0)
        return given
    low = float(load.min())
    high = low + amount
    for _ in range(ROUNDS):
        level = (low + high) / 2
        if np.maximum(level - load, 0.0).sum() < amount:
            low = level
        else:
            high = level
    given = np.maximum(high - load, 0.0)
    given *= amount / given.sum()
    over = float(np.maximum(given - room, 0.0).sum())
    if over > 0:
        given = np.minimum(given, room)
        left = np.where(np.isinf(load), 0.0, room - given)
        given += left * (over / max(float(left.sum()), 1e-12))
    return np.asarray(given)
