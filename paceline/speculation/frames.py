"""What target and draft say to each other, as plain data; `protos/paceline/v1/draft.proto` is its wire form.

One DraftFrame carries everything one engine step has to say about all sequences a pair shares. Positions
count from the start of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from paceline.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks. Fingerprints are equal iff token ids mean the same on both sides."""

    replica_id: str
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Open:
    """A sequence begins, or begins again, with its whole history; `depth` 0 prefills only.

    The first `prompt_length` tokens are the prompt: penalties tell it from the output.
    """

    sequence: int
    tokens: tuple[int, ...]
    params: SamplingParams
    depth: int
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Advance:
    """The target agreed on `tokens`, the first at position `base`; `depth` candidates are wanted next."""

    sequence: int
    base: int
    tokens: tuple[int, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class DraftFrame:
    """From target to draft: one step's openings, advances and closings."""

    opens: tuple[Open, ...] = ()
    advances: tuple[Advance, ...] = ()
    closes: tuple[int, ...] = ()


class DraftFailureReason(StrEnum):
    """Why a sequence gets no candidates. The first two ask the target to open it again."""

    UNKNOWN_SEQUENCE = "unknown_sequence"
    BASE_MISMATCH = "base_mismatch"
    BUSY = "busy"
    INTERNAL = "internal"

    @property
    def reopen(self) -> bool:
        return self in (DraftFailureReason.UNKNOWN_SEQUENCE, DraftFailureReason.BASE_MISMATCH)


@dataclass(frozen=True, slots=True)
class SparseRow:
    """A distribution over few tokens: ids and their probabilities, which sum to 1."""

    ids: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """From draft to target: tokens for positions base, base + 1, …; or the failure instead of them."""

    sequence: int
    base: int
    tokens: tuple[int, ...] = ()
    failure: DraftFailureReason | None = None
