"""What target and draft say to each other, as plain data; `protos/paceline/v1/draft.proto` is its wire form.

One DraftFrame carries everything one engine step has to say about all sequences a pair shares. Positions
count from the start of the prompt.

    target   agreed text ────────────────┬─ run: candidates it holds ─►
                                         │ Advance: agreed up to here; `depth` candidates are wanted next
    drafter  agreed text, as far as heard ┬─ drafted: `depth` at once, up to `ahead` more while the target is busy ─►
                                          └─ Candidates: base = agreed length it knew, offset = how far beyond

An agreed length occurs once in a sequence's life, so `base` also says which of the target's tokens the drafter knew:
what it drafted before it heard of a divergence is told from what it drafted after.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from paceline.types import SamplingParams

MAX_DEPTH = 16
"""Candidates a drafter owes at most for one advance, whatever is asked for."""
MAX_AHEAD = 64
"""Tokens it drafts at most beyond those."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks. Fingerprints are equal iff token ids mean the same on both sides."""

    replica_id: str
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Open:
    """A sequence begins, or begins again, with its whole history; `depth` 0 prefills only.

    The first `prompt_length` tokens are the prompt: penalties tell it from the output. `ahead` is a credit: so many
    tokens beyond `depth` may be drafted and sent before the target has said more. `rejection` asks for candidates
    drawn for rejection sampling, each with the distribution it came from. It is always answered: by candidates, by
    none once the prompt is computed, or by a failure. The parameters' streaming window is the target's own, and shifts
    at the same positions in both. `trace` is the traceparent of the target's work on it, "" if nobody traces.
    """

    sequence: int
    tokens: tuple[int, ...]
    params: SamplingParams
    depth: int
    prompt_length: int
    ahead: int = 0
    rejection: bool = False
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Advance:
    """The target agreed on `tokens`, the first at position `base`; `depth` candidates are wanted next, 0 for none.

    The tokens are told even where they repeat the drafter's own: a count and a checksum would save less than a byte
    a token, and tokens show a disagreement where it begins.
    """

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
    """Why a sequence gets no candidates. The first two ask the target to open it again; the drafter has forgotten it.

    BUSY concerns this sequence for now, UNSUPPORTED for ever, INTERNAL the drafter.
    """

    UNKNOWN_SEQUENCE = "unknown_sequence"
    BASE_MISMATCH = "base_mismatch"
    BUSY = "busy"
    INTERNAL = "internal"
    UNSUPPORTED = "unsupported"

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
    """From draft to target: tokens for positions base + offset, …; or the failure instead of them.

    `base` is the agreed length the drafter knew. Tokens before `offset` were sent earlier. `probs` has a row for
    each token under rejection sampling. `final` says that no more will follow: the drafter's context ends here.
    """

    sequence: int
    base: int
    tokens: tuple[int, ...] = ()
    failure: DraftFailureReason | None = None
    offset: int = 0
    probs: tuple[SparseRow, ...] = ()
    final: bool = False
