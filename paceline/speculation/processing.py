"""From logits to the scores a token is drawn from: temperature, top-k, top-p, min-p, in Transformers' order.

Draft and target both run this, on their own logits, under either way of verifying. A row's result does not
depend on the rows beside it. Ties at a filter's edge stay in.

Sorting 49152 scores takes 1.3 ms on one core, finding the 128 best of them 0.1 ms, and about half of the rows keep
no more tokens than that. So on a CPU rows are looked at in tiers: the 128 best, then the 1024 best, then all, each
row until its edge is found. Whoever needs only one token of a row need not find the edge of a wide one: a token is
inside the nucleus iff the mass above it is below top_p, which is one sum (`Unfiltered`). On a GPU, where looking at
a result means waiting for it, all rows are sorted at once. Where the kernel draws (`draws`), it filters, too; this is
then for those who need all scores of a row, and for the rows it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.types import SamplingParams

TIERS = (128, 1024)


@dataclass(frozen=True, slots=True)
class Survivors:
    """Of some rows of a batch, the tokens that no filter removed.

    `scores` is float32 [rows, width], -inf where removed; `ids` has the tokens they belong to, int64 of the
    same shape, None for 0, 1, … in order.
    """

    rows: torch.Tensor
    scores: torch.Tensor
    ids: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Unfiltered:
    """Rows whose top-p and min-p were not applied yet; `scores` are float32 [rows, vocab]."""

    rows: torch.Tensor
    scores: torch.Tensor
    filters: _Filters

    def keeps(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether the filters leave each row this token: bool [rows]."""
        own, highest = self.scores.gather(-1, tokens[:, None]), self.scores.amax(dim=-1, keepdim=True)
        masses = (self.scores - highest).exp_()
        total = masses.sum(dim=-1, keepdim=True, dtype=torch.float64)
        above = masses.mul_(self.scores > own).sum(dim=-1, keepdim=True, dtype=torch.float64)
        inside = (above < self.filters.top_p * total) | (self.filters.top_p >= 1)
        # A row with a NaN or an infinity has no distribution; whatever it gets, it must get it now.
        return ((inside & (own >= highest + self.filters.log_min_p)) | ~total.isfinite())[:, 0]


def process_logits(logits: torch.Tensor, params: SamplingParams | Sequence[SamplingParams]) -> torch.Tensor:
    """Scores of the whole vocabulary: float32 [n, vocab], -inf for the tokens filtered out.

    `logits` is float [n, vocab]; `params` are for all rows or for each; none of them greedy.
    """
    each = [params] * len(logits) if isinstance(params, SamplingParams) else list(params)
    scores = torch.full(logits.shape, -torch.inf, device=logits.device)
    for part in survivors(logits, each):
        assert isinstance(part, Survivors)
        if part.ids is None:
            scores[part.rows] = part.scores
        else:
            scores[part.rows] = scores[part.rows].scatter_(-1, part.ids, part.scores)
    return scores


def survivors(
    logits: torch.Tensor, params: Sequence[SamplingParams], *, lazy: bool = False
) -> Iterator[Survivors | Unfiltered]:
    """Every row of `logits`, [n, vocab], once, in groups; `params` has an entry for each row, none of them greedy.

    `lazy` may leave rows unfiltered that are expensive to filter.
    """
    vocab, device = logits.shape[-1], logits.device
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32).to(device)
    scores = logits.float() / temperature[:, None]
    filtered = [p.top_k in range(1, vocab) or p.top_p < 1 or p.min_p > 0 for p in params]
    if not all(filtered):
        rows = torch.tensor([n for n, found in enumerate(filtered) if not found], device=device)
        yield Survivors(rows, scores[rows] if any(filtered) else scores, None)
    if any(filtered):
        left = torch.tensor([n for n, found in enumerate(filtered) if found], device=device)
        if not all(filtered):
            scores = scores[left]
        filters = _Filters.of([p for p, found in zip(params, filtered, strict=True) if found], vocab, device)
        yield from _filtered(scores, left, filters, lazy and device.type == "cpu")


@dataclass(frozen=True, slots=True)
class _Filters:
    """Of each row, [n, 1]: a filter that is off has vocab, 1 or -inf here.

    `counted` says whether any row has a top-k, `nuclei` whether any has a top-p.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    counted: bool
    nuclei: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, device: torch.device) -> _Filters:
        top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        # In one copy to the device.
        columns = torch.tensor([top_k, [p.top_p for p in params], [p.min_p for p in params]], dtype=torch.float64)
        k, top_p, min_p = columns.to(device)[..., None]
        counted, nuclei = any(k < vocab for k in top_k), any(p.top_p < 1 for p in params)
        return cls(k.long(), top_p, min_p.float().log(), counted, nuclei)

    def of_rows(self, rows: torch.Tensor) -> _Filters:
        return replace(self, top_k=self.top_k[rows], top_p=self.top_p[rows], log_min_p=self.log_min_p[rows])


def _filtered(
    scores: torch.Tensor, rows: torch.Tensor, filters: _Filters, lazy: bool
) -> Iterator[Survivors | Unfiltered]:
    vocab = scores.shape[-1]
    if scores.device.type == "cpu":
        for width in TIERS:
            if width >= vocab:
                break
            best = scores.topk(width, dim=-1)
            edge = _edge(scores, best.values, filters)
            # What ties with the edge may go on past the last one looked at; so may what top-k leaves.
            counted = (filters.top_k <= width) | (filters.top_k == vocab)
            found = ((best.values[:, -1:] < edge) & counted)[:, 0]
            if bool(found.any()):
                kept = best.values[found]
                yield Survivors(rows[found], kept.masked_fill_(kept < edge[found], -torch.inf), best.indices[found])
            if bool(found.all()):
                return
            left = ~found
            if lazy and bool((unlimited := left & (filters.top_k[:, 0] == vocab)).any()):
                yield Unfiltered(rows[unlimited], scores[unlimited], filters.of_rows(unlimited))
                left &= ~unlimited
                if not bool(left.any()):
                    return
            scores, rows, filters = scores[left], rows[left], filters.of_rows(left)
    edge = _edge(scores, _descending(scores), filters)
    yield Survivors(rows, scores.masked_fill(scores < edge, -torch.inf), None)


def _descending(scores: torch.Tensor) -> torch.Tensor:
    """Each row in order. NumPy sorts values in vectors, three times as fast as PyTorch sorts them with places."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.detach().numpy(), axis=-1)).flip(-1)
    return scores.sort(dim=-1, descending=True).values


def _edge(scores: torch.Tensor, best: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """The lowest score each row keeps, [n, 1], if it is among the `best` of `scores`, which are in order.

    Where it is not, or where top-k leaves more than these, the result means nothing. Masses are summed in
    float64, so that the order of summing, which differs between devices and batches, decides only the nearest ties.
    """
    last, highest = best.shape[-1] - 1, best[:, :1]
    kth = best.gather(-1, (filters.top_k - 1).clamp(max=last))
    kth = kth.masked_fill_(filters.top_k >= scores.shape[-1], -torch.inf)
    edge = torch.maximum(kth, highest + filters.log_min_p)
    if not filters.nuclei:
        return edge
    masses = (scores - highest).exp_()
    if filters.counted:
        masses.masked_fill_(scores < kth, 0)
    total = masses.sum(dim=-1, keepdim=True, dtype=torch.float64)
    mass = (best - highest).exp_().cumsum(dim=-1, dtype=torch.float64)
    # The nucleus ends with the first token that reaches top_p of what top-k left.
    end = (mass < filters.top_p * total).sum(dim=-1, keepdim=True).clamp_(max=last)
    return torch.maximum(edge, best.gather(-1, end).masked_fill_(filters.top_p >= 1, -torch.inf))
