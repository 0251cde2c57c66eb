"""How long a replica may take to leave, and how many sessions it has still to hand over then.

Serve tells nobody of a replica that it has told to go, so that it cannot be asked; it writes down where every router
finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from paceline.config import AppSettings
from paceline.serving.journal import KeyValue, Readable

logger = logging.getLogger("ray.serve")

DRAFT_SHUTDOWN_S = 20.0
"""A draft that is told to leave may end its streams for so long."""
SPARE_S = 3.0
"""Between the last deadline of a replica that leaves and the moment it is killed."""


def router_leaving_s(settings: AppSettings) -> float:
    """Until Serve kills it."""
    return settings.router_drain_timeout_s + SPARE_S


def target_leaving_s(settings: AppSettings) -> float:
    """Until Serve kills it."""
    return settings.target.drain_timeout_s + settings.sessions.handoff_timeout_s + SPARE_S


def draft_leaving_s(settings: AppSettings) -> float:
    """Until Serve kills it."""
    return DRAFT_SHUTDOWN_S + settings.sessions.handoff_timeout_s


def longest_leaving_s(settings: AppSettings) -> float:
    """Of any replica of the application."""
    return max(router_leaving_s(settings), target_leaving_s(settings), draft_leaving_s(settings))


def note_left(app: str, replica_id: str, store: KeyValue) -> Callable[[int], None]:
    """Writes the number for one replica, and forgets it when it is 0. Never raises: it is only told."""

    def note(sessions: int) -> None:
        try:
            if sessions:
                store.put(_key(app, replica_id), str(sessions).encode())
            else:
                store.delete(_key(app, replica_id))
        except Exception:
            logger.warning("leaving: how many sessions are left cannot be written", exc_info=True)

    return note


def read_left(app: str, replicas: Iterable[str], store: Readable) -> dict[str, int]:
    """Of those that have any."""
    found = {replica_id: store.get(_key(app, replica_id)) for replica_id in replicas}
    return {replica_id: int(value) for replica_id, value in found.items() if value}


def _key(app: str, replica_id: str) -> str:
    return f"leaving/{app}/{replica_id}"
