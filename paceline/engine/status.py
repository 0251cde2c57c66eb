"""What an engine says about itself, for /status and /metrics.

Read while its thread goes on, by whichever thread: a step may take longer than who asks would wait. Numbers of one
answer may so be of two moments, a step apart at most.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The application builder imports this without torch.
    from paceline.engine.engine import Engine


def status_of(engine: Engine) -> dict[str, Any]:
    """Ready for JSON."""
    usage, sessions = engine.kv.usage(), session_states(engine)
    numbers: dict[str, Any] = {
        "running": engine.num_running,
        "waiting": engine.num_waiting,
        "queued_prefill_tokens": engine.queued_prefill_tokens,
        "kv_tokens_total": usage.total,
        "kv_tokens_in_use": usage.in_use,
        "kv_tokens_cached": usage.cached,
        "sessions": sessions["running"] + sessions["idle"],
        "sessions_by_state": sessions,
        "drafted_tokens": engine.tally.drafted,
        "accepted_tokens": engine.tally.accepted,
        "telemetry": engine.telemetry.numbers(engine.preemptions),
    }
    return numbers if engine.restores is None else numbers | engine.restores.status()


def session_states(engine: Engine) -> dict[str, int]:
    """How many sessions run, lie in the KV cache, in host memory and on disk, each counted where it is soonest at
    hand."""
    running, held = engine.kv.session_names()
    places = engine.restores.tiers.places() if engine.restores is not None else {}
    below = Counter(tier for name, tier in places.items() if name not in held)
    return {"running": len(running), "idle": len(held - running), "host": below["host"], "disk": below["disk"]}
