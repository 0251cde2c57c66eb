"""The streaming window: a sequence that fills its context forgets tokens behind its first ones, and goes on.

StreamingLLM (Xiao et al. 2309.17453), under llama.cpp's names. The first tokens are attention sinks: a model that
loses their keys and values says nothing sensible any more. Positions are counted in the cache, not in the text.

    full      sinks │ discarded │ kept                    ctx_size keys and values
    shifted   sinks │ kept                    │ free      kept ones move down, their keys turned back by as much

What is dropped follows from the length of the text alone, never from batches, chunks or candidates: so keys and values
computed again from the history are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import InvalidRequest

DEFAULT_N_KEEP = 4
"""Sinks that all models of the paper were content with."""
HALF = -1


@dataclass(frozen=True, slots=True)
class StreamingWindow:
    """At most `ctx_size` tokens are seen: the first `n_keep`, and the latest, of which `n_discard` go at a time.

    `n_discard` -1 is half of those behind the sinks, and is resolved on construction. Raises InvalidRequest naming
    the field.
    """

    ctx_size: int
    n_keep: int = DEFAULT_N_KEEP
    n_discard: int = HALF

    def __post_init__(self) -> None:
        if self.n_keep < 0:
            raise InvalidRequest(f"n_keep: must be at least 0, got {self.n_keep}", param="n_keep")
        behind = self.ctx_size - self.n_keep
        if behind < 2:
            raise InvalidRequest(
                f"ctx_size: {self.ctx_size} leaves no room behind n_keep, which is {self.n_keep}; at least "
                f"{self.n_keep + 2} are needed",
                param="ctx_size",
            )
        if self.n_discard == HALF:
            object.__setattr__(self, "n_discard", behind // 2)
        if not 1 <= self.n_discard < behind:
            raise InvalidRequest(
                f"n_discard: must be -1, for half, or from 1 to {behind - 1} with this ctx_size and n_keep, got "
                f"{self.n_discard}",
                param="n_discard",
            )

    def dropped(self, length: int) -> int:
        """Tokens that keys and values lack once `length` of the text are computed."""
        beyond = length - self.ctx_size
        return -(-beyond // self.n_discard) * self.n_discard if beyond > 0 else 0

    def edge(self, length: int) -> int:
        """The length at which the window that holds the last of `length` tokens is full, and shifts before the next."""
        return self.ctx_size + self.dropped(length)


def dropped_under(window: StreamingWindow | None, length: int) -> int:
    """`StreamingWindow.dropped`; 0 without a window."""
    return window.dropped(length) if window is not None else 0
