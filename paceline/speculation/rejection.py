"""Rejection sampling (Leviathan et al. 2211.17192; Chen et al. 2302.01318): the second way to verify candidates.

Of a candidate x drawn from q, with p the target's distribution at its position:

    accept x with probability min(1, p(x) / q(x)); on refusal draw from norm(max(p - q, 0)).
    After the last candidate, if all were accepted, one more token is drawn from p.

The tokens are then distributed as p, whatever q is, as long as x was drawn from exactly the q used here and
independently of the draws made here. Two things follow:

- The drafter cuts its distribution to its TOP_K likeliest tokens, renormalizes it, rounds it to float32 and
  draws from what is left. That sparse row is q, and it crosses the wire unchanged. A candidate without a row
  (prompt lookup) counts as certain, q is the token alone: right however it was found, and less often accepted than
  it would be with the row it was drawn from.
- Each kind of draw has a stream of its own: pure functions of (request seed, purpose, position), apart from
  each other and from the noise of `coupling`. Sharing a stream with the drafter would bias the output.

Which candidates are verified against their row must not depend on what they are, only on what came before them: to
keep a candidate because of its value is to draw from another q. So an id the target does not know is refused, like
any token with p(x) = 0, and not passed over (`Guess.impossible`). A row that is no distribution, or does not hold its
candidate, comes from a drafter that broke the protocol: that candidate and those after it count as not proposed, and
the target draws its own token there (`usable`). A drafter that states another q than it drew from biases the output;
no target can notice.

Greedy decoding needs no distribution: a candidate stands iff it is the likeliest token, as in `coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch

from paceline.seeds import GOLDEN, mix
from paceline.speculation import coupling
from paceline.speculation.frames import SparseRow
from paceline.speculation.processing import process_logits
from paceline.speculation.sampling import Rows, adjust_all, by_row
from paceline.types import SamplingParams

TOP_K = 64
"""Tokens a draft's row keeps: about 450 bytes on the wire."""
SUM_TOLERANCE = 1e-3
"""How far from 1 a row may sum. Rounding 64 probabilities to float32 moves the sum by 4e-6 at most."""

_DOMAIN = 0xA0761D6478BD642F
_POSITION_STEP = 0xD1342543DE82EF95


class Purpose(IntEnum):
    """What a uniform is drawn for: a candidate, its acceptance, the token after a refusal, the target's own token."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    OWN = 4


@dataclass(frozen=True, slots=True)
class Guess:
    """What was proposed for one sequence: `tokens`, and a row for each, or none if they are certain.

    `impossible` is the row of a candidate after these whose id the target does not know.
    """

    tokens: Sequence[int] = ()
    probs: Sequence[SparseRow] = ()
    impossible: SparseRow | None = None

    def rows(self) -> list[SparseRow]:
        """The distributions of the usable candidates, then that of the impossible one if they lead up to it."""
        given = self.probs or [SparseRow((token,), (1.0,)) for token in self.tokens]
        rows: list[SparseRow] = []
        for token, row in zip(self.tokens, given, strict=False):
            if not usable(token, row):
                return rows
            rows.append(row)
        whole = len(rows) == len(self.tokens)
        return [*rows, self.impossible] if whole and self.impossible and _is_distribution(self.impossible) else rows


@dataclass(frozen=True, slots=True)
class Verdict:
    """The candidates accepted and one token more; how many were accepted."""

    tokens: list[int]
    accepted: int


def uniform(seed: int, purpose: Purpose, position: int) -> float:
    """In (0, 1), 52 bits: the one number drawn for a purpose at a position."""
    key = mix(mix(mix(seed) ^ _DOMAIN) + purpose * GOLDEN)
    bits = mix(key + (position + 1) * _POSITION_STEP)
    return ((bits >> 12) + 0.5) * 2.0**-52


def usable(token: int, row: SparseRow) -> bool:
    """Whether the row is a distribution from which the token can have been drawn."""
    return _is_distribution(row) and dict(zip(row.ids, row.probs, strict=True)).get(token, 0.0) > 0


def draft(logits: torch.Tensor, batch: Sequence[Rows]) -> list[tuple[int, SparseRow]]:
    """The drafter's side: of each member the candidate and the distribution it was drawn from.

    `logits` is [len(batch), vocab]; each member has one row (`Rows.count` 1). Greedy members get the likeliest
    token, certain. The row sums to 1 within float32's rounding, has at most TOP_K tokens, each with a
    probability above 0, and always holds the candidate.
    """
    found: list[tuple[int, SparseRow]] = [(-1, SparseRow((), ()))] * len(batch)
    logits = adjust_all(logits, batch)
    greedy = [n for n, rows in enumerate(batch) if rows.params.greedy]
    sampled = [n for n, rows in enumerate(batch) if not rows.params.greedy]
    if greedy:
        for n, token in zip(greedy, _pick(logits, greedy).argmax(dim=-1).tolist(), strict=True):
            found[n] = token, SparseRow((token,), (1.0,))
    if sampled:
        for n, drawn in zip(sampled, _draft(_pick(logits, sampled), [batch[n] for n in sampled]), strict=True):
            found[n] = drawn
    return found


def verify(logits: torch.Tensor, batch: Sequence[Rows], guesses: Sequence[Guess]) -> list[Verdict]:
    """The target's side: of each member what its candidates come to.

    `logits` is [sum of counts, vocab]; a member's `following` are all its candidates, and it has a row for each
    and one more. Without candidates this is a plain draw. One copy from the device for the whole batch.
    """
    logits = adjust_all(logits, batch)
    verdicts: list[Verdict | None] = [None] * len(batch)
    starts = [0]
    for rows in batch:
        starts.append(starts[-1] + rows.count)
    for greedy in (True, False):
        members = [n for n, rows in enumerate(batch) if rows.params.greedy is greedy]
        if members:
            its = _pick(logits, [row for n in members for row in range(starts[n], starts[n + 1])])
            each = [batch[n] for n in members], [guesses[n] for n in members]
            for n, verdict in zip(members, (_verify_greedy if greedy else _verify)(its, *each), strict=True):
                verdicts[n] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def _draft(logits: torch.Tensor, batch: Sequence[Rows]) -> list[tuple[int, SparseRow]]:
    params, positions = by_row(batch)
    best = process_logits(logits, params).topk(min(TOP_K, logits.shape[-1]))
    # Drawn from what is sent: the rounded numbers.
    probs = best.values.double().softmax(dim=-1).float().double()
    places = _draw(probs, [uniform(_seed(p), Purpose.DRAFT, at) for p, at in zip(params, positions, strict=True)])
    table = torch.cat([places[:, None].double(), best.indices.double(), probs], dim=-1)
    found = []
    for place, *row in table.tolist():
        width = len(row) // 2
        kept = [n for n in range(width) if row[width + n] > 0]
        ids = tuple(int(row[n]) for n in kept)
        found.append((int(row[int(place)]), SparseRow(ids, tuple(row[width + n] for n in kept))))
    return found


def _verify_greedy(logits: torch.Tensor, batch: Sequence[Rows], guesses: Sequence[Guess]) -> list[Verdict]:
    likeliest, verdicts = iter(logits.argmax(dim=-1).tolist()), []
    for rows, guess in zip(batch, guesses, strict=True):
        own = [next(likeliest) for _ in range(rows.count)]
        accepted = coupling.accept(guess.tokens, own)
        verdicts.append(Verdict(own[: accepted + 1], accepted))
    return verdicts


def _verify(logits: torch.Tensor, batch: Sequence[Rows], guesses: Sequence[Guess]) -> list[Verdict]:
    vocab, device = logits.shape[-1], logits.device
    scores = process_logits(logits, by_row(batch)[0])
    highest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - highest).exp_()
    totals = weights.sum(dim=-1, dtype=torch.float64)

    plan = _Plan.of(batch, guesses, vocab).to(device)
    above = plan.rows[:, :-1]
    p_x = weights[above, plan.tried].double() / totals[above]
    stands = plan.accept * plan.q_of_tried < p_x
    accepted = stands.long().cumprod(dim=-1).sum(dim=-1, keepdim=True)

    last = plan.rows.gather(-1, accepted)[:, 0]
    p = weights[last].double() / totals[last][:, None]
    q_ids, q = (table.take_along_dim(accepted[..., None], dim=1)[:, 0] for table in (plan.ids, plan.probs))
    residual = p.scatter_add(-1, q_ids, -q).clamp_(min=0)
    # A refusal by rounding alone leaves nothing: then p and q are equal but for it.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    tokens = _draw(residual, plan.final.gather(-1, accepted)[:, 0])
    found = torch.stack([accepted[:, 0], tokens], dim=-1).tolist()
    return [Verdict([*guess.tokens[:n], token], n) for guess, (n, token) in zip(guesses, found, strict=True)]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Numbers of every member and candidate, made on the host; k is the most candidates of any member.

    `rows` [members, k + 1] are rows of logits. `tried`, `q_of_tried` and `accept` [members, k] are the
    candidates, their q and their uniforms; beyond a member's candidates a uniform of infinity refuses. `ids` and
    `probs` [members, k + 1, width] are the distributions, 0 where there is none, and `final` [members, k + 1] the
    uniform that draws the last token if so many are accepted.
    """

    rows: torch.Tensor
    tried: torch.Tensor
    q_of_tried: torch.Tensor
    accept: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    final: torch.Tensor

    @classmethod
    def of(cls, batch: Sequence[Rows], guesses: Sequence[Guess], vocab: int) -> _Plan:
        distributions = [guess.rows() for guess in guesses]
        k = max(min(len(guess.tokens), len(q)) for guess, q in zip(guesses, distributions, strict=True))
        width = max((len(row.ids) for q in distributions for row in q), default=1)
        columns: list[list[Any]] = [[] for _ in range(7)]
        start = 0
        for rows, guess, q in zip(batch, guesses, distributions, strict=True):
            for column, row in zip(
                columns, _plan_one(rows, guess.tokens[: len(q)], q, start, vocab, k, width), strict=True
            ):
                column.append(row)
            start += rows.count
        kinds = (torch.int64, torch.int64, torch.float64, torch.float64, torch.int64, torch.float64, torch.float64)
        return cls(*(torch.tensor(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)))

    def to(self, device: torch.device) -> _Plan:
        return _Plan(*(getattr(self, each.name).to(device) for each in fields(self)))


def _plan_one(
    rows: Rows, tokens: Sequence[int], q: Sequence[SparseRow], start: int, vocab: int, k: int, width: int
) -> Iterator[list[Any]]:
    """One member's row of each of the plan's tables; `q` may have one more than there are `tokens`."""
    seed, positions, tried = _seed(rows.params), rows.positions, len(tokens)
    totals = [math.fsum(row.probs) for row in q]
    scaled = [
        {token: x / total for token, x in zip(row.ids, row.probs, strict=True)}
        for row, total in zip(q, totals, strict=True)
    ]
    known = [{token: x for token, x in row.items() if token < vocab} for row in scaled]
    possible = [token in row for token, row in zip(tokens, known, strict=False)]
    yield [min(start + place, start + rows.count - 1) for place in range(k + 1)]
    yield _padded([token if fits else 0 for token, fits in zip(tokens, possible, strict=True)], k, 0)
    yield _padded([row[token] for token, row in zip(tokens, scaled, strict=False)], k, 1.0)
    accept = [uniform(seed, Purpose.ACCEPT, position) for position in positions[:tried]]
    yield _padded([u if fits else math.inf for u, fits in zip(accept, possible, strict=True)], k, math.inf)
    yield _padded([_padded(list(row), width, 0) for row in known], k + 1, [0] * width)
    yield _padded([_padded(list(row.values()), width, 0.0) for row in known], k + 1, [0.0] * width)
    purposes = [Purpose.RESIDUAL if place < len(q) else Purpose.OWN for place in range(tried + 1)]
    yield _padded([uniform(seed, *at) for at in zip(purposes, positions, strict=False)], k + 1, 0.0)


def _padded(values: list[Any], length: int, filler: Any) -> list[Any]:
    return values + [filler] * (length - len(values))


def _draw(weights: torch.Tensor, u: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Of each row of weights, float64 [n, m], the place that its uniform falls on: int64 [n]."""
    edges = weights.cumsum(dim=-1)
    aims = torch.as_tensor(u, dtype=torch.float64, device=weights.device)[:, None] * edges[:, -1:]
    return torch.searchsorted(edges, aims, right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _is_distribution(row: SparseRow) -> bool:
    return (
        len(row.ids) == len(row.probs) == len(set(row.ids))
        and all(token >= 0 for token in row.ids)
        and all(0 <= q <= 1 + SUM_TOLERANCE for q in row.probs)
        and abs(math.fsum(row.probs) - 1) <= SUM_TOLERANCE
    )


def _pick(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]


def _seed(params: SamplingParams) -> int:
    assert params.seed is not None, "a seed is fixed where a request enters"
    return params.seed
