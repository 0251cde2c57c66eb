"""Rejection sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318): the second way to verify candidates.

Of a candidate x drawn from q, with p the target's distribution at its position:

    accept x with probability min(1, p(x) / q(x)); on refusal draw from norm(max(p - q, 0)).
    After the last candidate, if all were accepted, one more token is drawn from p.

The tokens are then distributed as p, whatever q is, as long as x was drawn from exactly the q used here and
independently of the draws made here. Two things follow:

- The drafter cuts its distribution to its TOP_K likeliest tokens, renormalizes it, rounds it to float32 and
  draws from what is left. That sparse row is q, and it crosses the wire unchanged. A candidate without a row
  (prompt lookup) is certain: q is the token alone.
- Each kind of draw has a stream of its own: pure functions of (request seed, purpose, position), apart from
  each other and from the noise of `coupling`. Sharing a stream with the drafter would bias the output.

Which candidates are verified must not depend on what they are, only on what came before them. Against one that
has no usable row (`usable`) nothing right can be done: it and those after it count as not proposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from paceline.seeds import GOLDEN, mix
from paceline.speculation.frames import SparseRow
from paceline.speculation.processing import process_logits
from paceline.speculation.sampling import Rows, adjust

TOP_K = 64
"""Tokens a draft's row keeps: about 450 bytes on the wire."""

_DOMAIN = 0xA0761D6478BD642F
_POSITION_STEP = 0xD1342543DE82EF95


class Purpose(IntEnum):
    """What a uniform is drawn for."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    OWN = 4


def uniform(seed: int, purpose: Purpose, position: int) -> float:
    """In (0, 1), 53 bits: the one number drawn for a purpose at a position."""
    key = mix(mix(mix(seed) ^ _DOMAIN) + purpose * GOLDEN)
    bits = mix(key + (position + 1) * _POSITION_STEP)
    return ((bits >> 11) + 0.5) * 2.0**-53


def draft(logits: torch.Tensor, batch: Sequence[Rows]) -> list[tuple[int, SparseRow]]:
    """The drafter's side: of each member the candidate and the distribution it was drawn from.

    `logits` is [len(batch), vocab]; each member has one row (`Rows.count` 1). Greedy members get the likeliest
    token, certain. The row sums to 1 within float32's rounding, has at most TOP_K tokens, each with a
    probability above 0, and always holds the candidate.
    """
    return [_draft_one(logits[n : n + 1], rows) for n, rows in enumerate(batch)]


def _draft_one(logits: torch.Tensor, rows: Rows) -> tuple[int, SparseRow]:
    logits = adjust(logits, rows)
    if rows.params.greedy:
        token = int(logits.argmax())
        return token, SparseRow((token,), (1.0,))
    assert rows.params.seed is not None, "a seed is fixed where a request enters"
    best = process_logits(logits, rows.params)[0].topk(min(TOP_K, logits.shape[-1]))
    probs = best.values.double().softmax(-1).float()
    ids, kept = best.indices[probs > 0].tolist(), probs[probs > 0].double()
    edges = kept.cumsum(-1)
    u = uniform(rows.params.seed, Purpose.DRAFT, rows.positions[0])
    place = int((edges <= u * edges[-1]).sum().clamp(max=len(ids) - 1))
    return ids[place], SparseRow(tuple(ids), tuple(kept.tolist()))
