"""What ranks tell each other through their store before they have a group. Every wait has a deadline."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from paceline.engine.tp.group import not_joined


def told(store: Store, key: str, by: int, timeout_s: float) -> str:
    """What rank `by` sets `key` to, once it has. EngineError after the deadline."""
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        found: bytes = store.get(key)
    except RuntimeError as error:  # of torch: waited too long, or rank 0 and its store are gone
        raise not_joined(by, timeout_s) from error
    return found.decode()


def agree(store: Store, topic: str, rank: int, size: int, trouble: str | None, timeout_s: float) -> str | None:
    """The same on all ranks: None if none has trouble, else what the first that has it says."""
    store.set(f"{topic} {rank}", trouble or "")
    answers = [told(store, f"{topic} {other}", other, timeout_s) for other in range(size)]
    return next((f"rank {other}: {answer}" for other, answer in enumerate(answers) if answer), None)
