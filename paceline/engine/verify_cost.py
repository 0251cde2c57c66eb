"""The cost of a forward pass by its rows, measured once at start-up: what the depth controller begins with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from paceline.engine.attention import Window
from paceline.engine.kv_cache import KVCache, KVEntry, SlabKVCache
from paceline.engine.runner import Runner
from paceline.errors import EngineError
from paceline.speculation.cost import VerifyCost

logger = logging.getLogger(__name__)

ROWS = (1, 8, 4, 16, 2, 6, 32, 3, 12, 24, 64)
"""In the order in which they are measured: a slow model is left with a coarse curve."""
CONTEXT = 256
WINDOW = 8
"""Rows of one window; more rows are several windows, as they are when sequences share a pass."""
ROUNDS = 3
BUDGET_S = 1.0


def measure_verify_cost(
    runner: Runner,
    kv: KVCache | None = None,
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> VerifyCost:
    """The least of up to three rounds; no new measurement begins after `budget_s`, but the first two are made.

    `kv` is the cache that steps will run over, for what a runner prepares for that one; it is left as it was.

    On a GPU each size runs once before, beyond the budget: kernels are loaded at first use, in most of a second.
    """
    longest = min(runner.max_model_len, kv.usage().total if kv is not None else runner.max_model_len)
    context = max(1, min(CONTEXT, longest - WINDOW - 1))
    room = min(context + WINDOW, longest)
    if kv is None:
        geometry = runner.kv_geometry()
        kv = SlabKVCache(geometry, room, room, memory=runner.kv_memory(geometry, room, room))
    entry = kv.reserve([0] * room, room)
    if entry is None:
        raise EngineError(f"KV cache: no room for the {room} tokens that measuring the cost of rows takes")
    entry.fill(context)
    kv.append(entry, [0] * context)
    began, seconds, apart = clock(), dict[int, float](), float("inf")
    _time(runner, entry, [1], clock)  # the first pass allocates
    for number in range(ROUNDS):
        for rows in ROWS:
            if clock() - began > budget_s and len(seconds) >= 2:
                break
            windows = _windows(rows)
            if number == 0 and runner.device.type != "cpu":
                began += _time(runner, entry, windows, clock)
            seconds[rows] = min(seconds.get(rows, float("inf")), _time(runner, entry, windows, clock))
        if number == 0 and runner.device.type != "cpu":
            began += _time(runner, entry, [1] * WINDOW, clock)
        apart = min(apart, _time(runner, entry, [1] * WINDOW, clock))
        if clock() - began > budget_s:
            break
    kv.truncate(entry, 0)
    kv.release(entry)
    window_s = max(0.0, (apart - seconds[WINDOW]) / (WINDOW - 1))
    # What is left is the rows' alone: a sequence more costs the same whether its window is long or short.
    points = {rows: max(took - (len(_windows(rows)) - 1) * window_s, took / 4) for rows, took in seconds.items()}
    curve = ", ".join(f"{rows}: {1e3 * points[rows]:.1f}" for rows in sorted(points))
    logger.info("forward pass by rows, ms: %s; each window beyond the first %.2f", curve, 1e3 * window_s)
    return VerifyCost(points, window_s)


def _windows(rows: int) -> list[int]:
    return [WINDOW] * (rows // WINDOW) + [rows % WINDOW] * (rows % WINDOW > 0)


def _time(runner: Runner, entry: KVEntry, windows: list[int], clock: Callable[[], float]) -> float:
    batch = [Window(entry, [0] * rows, sample=rows) for rows in windows]
    began = clock()
    logits = runner.run(batch)
    logits[0, 0].item()  # waits for the device
    return clock() - began
