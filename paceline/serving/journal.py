"""What the autoscaler decided and why, where every router finds it: in the key-value store of the Ray cluster.

The policy runs in Serve's controller, which no request reaches and which may be replaced; the store outlives it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from paceline.autoscaling.snapshot import Decision, Decisions, Pool
from paceline.config import AppSettings

logger = logging.getLogger("ray.serve")

MAX_DECISIONS = 50
REFRESH_S = 5.0
"""What changes with every look, as the signals do, is written so often."""


NAMESPACE = b"paceline"
"""Of what this package keeps in the store of a Ray cluster."""


class Readable(Protocol):
    """Bytes by name."""

    def get(self, key: str) -> bytes | None:
        """None if there is nothing of that name."""


class KeyValue(Readable, Protocol):
    """A store of them."""

    def put(self, key: str, value: bytes) -> None:
        """Put it there, in place of what was."""

    def delete(self, key: str) -> None:
        """Forget it, if it is there."""


class ClusterKeyValue:
    """The store of the Ray cluster that this process belongs to. Calls block for about a millisecond."""

    def get(self, key: str) -> bytes | None:
        from ray.experimental.internal_kv import _internal_kv_get

        found: bytes | None = _internal_kv_get(key.encode(), namespace=NAMESPACE)
        return found

    def put(self, key: str, value: bytes) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key.encode(), value, overwrite=True, namespace=NAMESPACE)

    def delete(self, key: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(key.encode(), namespace=NAMESPACE)


def read_journal(app: str, store: KeyValue) -> dict[str, Any]:
    """What was written last, ready for JSON; empty if there is nothing or it cannot be read."""
    try:
        found = json.loads(store.get(_key(app)) or b"{}")
    except Exception:
        logger.warning("the autoscaler's decisions cannot be read", exc_info=True)
        return {}
    return found if isinstance(found, dict) else {}


async def autoscaling_status(settings: AppSettings, app: str, store: KeyValue) -> dict[str, Any]:
    """For /status: the replicas wanted, and the journal if there is an autoscaler."""
    wanted = {
        Pool.TARGET.value: {"wanted": settings.target_replicas.first},
        Pool.DRAFT.value: {"wanted": settings.draft_replicas.first},
    }
    enabled = settings.autoscaling.enabled
    return {"enabled": enabled, **wanted, **(await asyncio.to_thread(read_journal, app, store) if enabled else {})}


class Journal:
    """Writes decisions: each change as a log line, all of it to the store. Never raises: scaling goes on without it."""

    def __init__(self, app: str, store: KeyValue, clock: Callable[[], float] = time.monotonic) -> None:
        self._key, self._store, self._clock = _key(app), store, clock
        before = read_journal(app, store)  # a controller that was replaced goes on counting
        self._decisions: list[dict[str, Any]] = list(before.get("decisions") or [])[-MAX_DECISIONS:]
        self._counts: dict[str, int] = dict(before.get("counts") or {})
        self._errors, self._error = int(before.get("errors") or 0), str(before.get("error") or "")
        self._pools: dict[str, dict[str, Any]] = {}
        self._changes: dict[Pool, tuple[int, int]] = {}
        """What the last look said of each pool: Serve may take a moment to act on it, and it is one change."""
        self._waiting: tuple[str, ...] = ()
        self._due = 0.0

    def note(self, decisions: Decisions, running: Mapping[Pool, int], waiting: tuple[str, ...] = ()) -> None:
        """A look is over. `running` names the pools there are; `waiting` says which replicas cannot start, and why."""
        changed = waiting != self._waiting
        for text in set(waiting) - set(self._waiting):
            logger.warning("autoscaling: %s", text)
        self._waiting = waiting
        for decision in (decisions.target, decisions.draft):
            if decision.pool not in running:
                continue
            if decision.changes and self._changes.get(decision.pool) != (decision.before, decision.replicas):
                self._note_change(decision)
                changed = True
            self._changes[decision.pool] = decision.before, decision.replicas
            signals = {
                reason.value: wants for (pool, reason), wants in decisions.signals.items() if pool is decision.pool
            }
            self._pools[decision.pool.value] = {
                "wanted": decision.replicas,
                "running": running[decision.pool],
                "reason": decision.reason.value,
                "text": decision.text,
                "signals": signals,
            }
        self._write(at_once=changed)

    def note_error(self, error: Exception) -> None:
        """The policy failed. Logged whenever it fails in another way than before."""
        text = f"{type(error).__name__}: {error}"
        if text != self._error:
            logger.error("autoscaling: the policy failed; every pool stays as it is", exc_info=error)
        self._errors, known = self._errors + 1, self._error
        self._error = text
        self._write(at_once=text != known)

    def _note_change(self, decision: Decision) -> None:
        direction = "up" if decision.replicas > decision.before else "down"
        name = f"{decision.pool.value}/{direction}/{decision.reason.value}"
        self._counts[name] = self._counts.get(name, 0) + 1
        entry = {
            "time": time.time(),
            "pool": decision.pool.value,
            "before": decision.before,
            "replicas": decision.replicas,
            "reason": decision.reason.value,
            "text": decision.text,
        }
        self._decisions = [*self._decisions[1 - MAX_DECISIONS :], entry]
        logger.info(
            "autoscaling: %s %d -> %d, %s: %s",
            decision.pool.value,
            decision.before,
            decision.replicas,
            decision.reason.value,
            decision.text,
        )

    def _write(self, *, at_once: bool) -> None:
        now = self._clock()
        if not at_once and now < self._due:
            return
        self._due = now + REFRESH_S
        told = {
            **self._pools,
            "decisions": self._decisions,
            "counts": self._counts,
            "errors": self._errors,
            "error": self._error,
            "waiting": list(self._waiting),
        }
        try:
            self._store.put(self._key, json.dumps(told).encode())
        except Exception:
            logger.warning("the autoscaler's decisions cannot be written", exc_info=True)


def _key(app: str) -> str:
    return f"autoscaling/{app}"
