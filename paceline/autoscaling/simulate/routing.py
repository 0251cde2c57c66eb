"""Requests go to the least loaded."""

from __future__ import annotations

import numpy as np

from paceline.autoscaling.simulate.profile import Array

ROUNDS = 12


def level_out(load: Array, amount: float) -> Array:
    """How `amount` is shared out so that those who get some end at one level; an infinite load gets nothing."""
    if amount <= 0:
        return np.zeros(len(load))
    low = float(load.min())
    high = low + amount
    for _ in range(ROUNDS):
        level = (low + high) / 2
        if np.maximum(level - load, 0.0).sum() < amount:
            low = level
        else:
            high = level
    given = np.maximum(high - load, 0.0)
    return np.asarray(given * (amount / given.sum()))
