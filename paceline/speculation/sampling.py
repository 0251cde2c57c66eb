"""From rows of logits to tokens, for the target and for the draft alike: history in, token ids out.

    logits ── min_tokens, bias, penalties, grammar ── temperature, top-k, top-p, min-p ── coupled noise ──► token
              (this module; they need the history)    (processing)                        (coupling)

Inside a verification window each row has its own history: the tokens agreed on, then the candidates above
it. Row by row that is what plain decoding would see, so speculation changes nothing about the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.speculation import coupling
from paceline.speculation.grammar import Matcher
from paceline.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Rows:
    """The `count` consecutive rows of logits that draw tokens of one sequence.

    The last row draws the token after `tokens` and `following`, each row above it one token earlier. The
    first `prompt_length` of `tokens` are the prompt. The `matcher` of the parameters' grammar has followed `tokens`.
    """

    params: SamplingParams
    prompt_length: int
    tokens: Sequence[int]
    following: Sequence[int] = ()
    count: int = 1
    matcher: Matcher | None = None

    @property
    def positions(self) -> range:
        """Of the tokens drawn, from the start of the prompt."""
        end = len(self.tokens) + len(self.following)
        return range(end - self.count + 1, end + 1)

    @property
    def adjusted(self) -> bool:
        """Whether logits are changed before temperature and filters."""
        return self.params.adjusts or self.matcher is not None

    @property
    def settled(self) -> int:
        """How many of `following` every row has in its history."""
        return len(self.following) - self.count + 1


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Which tokens of a vocabulary of `vocab` the columns of some logits belong to: `ids`, int64 [m], ascending."""

    ids: torch.Tensor
    vocab: int

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, m] logits as [n, vocab], -inf for the tokens without a column."""
        return logits.new_full((len(logits), self.vocab), -torch.inf).index_copy_(1, self.ids, logits)


def draw(logits: torch.Tensor, batch: Sequence[Rows], columns: Columns | None = None) -> list[list[int]]:
    """The tokens of each member of a batch, in order; `logits` is [sum of counts, vocab], or has `columns`.

    All rows are drawn together, whatever their parameters, and come back in one copy.
    """
    params, positions = by_row(batch)
    if columns is not None and _adjusting(batch):
        logits, columns = columns.whole(logits), None
    ids = None if columns is None else columns.ids
    tokens = iter(coupling.draw_rows(adjust_all(logits, batch), params, positions, ids).tolist())
    return [[next(tokens) for _ in range(rows.count)] for rows in batch]


def accepted_run(drawn: Sequence[int], candidates: Sequence[int]) -> tuple[list[int], int]:
    """Of what a member drew, up to the first token that is not the candidate there: the accepted run and one token
    more; and how many are accepted. It drew a token for each candidate and one more.
    """
    accepted = coupling.accept(candidates, drawn)
    return list(drawn[: accepted + 1]), accepted


def by_row(batch: Sequence[Rows]) -> tuple[list[SamplingParams], list[int]]:
    """Parameters and position of every row."""
    params = [rows.params for rows in batch for _ in range(rows.count)]
    return params, [position for rows in batch for position in rows.positions]


def adjust_all(logits: torch.Tensor, batch: Sequence[Rows]) -> torch.Tensor:
    """`adjust` for every member: [sum of counts, vocab], the same tensor if nobody wants it."""
    if not _adjusting(batch):
        return logits
    adjusted, start = logits.float().clone(), 0
    for rows in batch:
        end = start + rows.count
        if rows.adjusted:
            adjusted[start:end] = adjust(logits[start:end], rows)
        start = end
    return adjusted


def adjust(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Logits after min_tokens, bias, penalties and grammar: float32 [count, vocab]; the same tensor if none is set.

    Order and formulas are vLLM's; the repetition penalty is also Transformers' (Keskar et al. 1909.05858).
    """
    params = rows.params
    if not rows.adjusted:
        return logits
    own, logits = logits, logits.float().clone()
    _mask_ends(logits, rows)
    for token, bias in params.bias.items():
        if token < logits.shape[-1]:
            logits[:, token] += bias
    if params.penalizes:
        logits = _penalized(logits, rows)
    return logits if rows.matcher is None else _within_grammar(logits, own, rows, rows.matcher)


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """What the distribution of each row, unprocessed, says of its token and of the `top` likeliest.

    `logits` is [len(tokens), vocab].
    """
    scores = logits.float().log_softmax(dim=-1)
    chosen = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = (scores > chosen).sum(dim=-1) + 1
    best = scores.topk(min(top, scores.shape[-1]), dim=-1)
    columns = (tokens, chosen[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids, values, strict=True)))
        for token, logprob, rank, ids, values in zip(*columns, strict=True)
    ]


def _adjusting(batch: Sequence[Rows]) -> bool:
    return any(rows.adjusted for rows in batch)


def _mask_ends(logits: torch.Tensor, rows: Rows) -> None:
    """Rows with fewer than `min_tokens` before them draw none of `stop_token_ids`; an engine adds EOS to these."""
    missing = rows.params.min_tokens - (rows.positions[0] - rows.prompt_length)
    ends = [token for token in rows.params.stop_token_ids if token < logits.shape[-1]]
    if missing > 0 and ends:
        logits[:missing, ends] = -torch.inf


def _within_grammar(logits: torch.Tensor, own: torch.Tensor, rows: Rows, matcher: Matcher) -> torch.Tensor:
    """-inf for what the grammar refuses. Where min_tokens left nothing else, the grammar wins: its tokens get the
    model's `own` logits."""
    refused = matcher.refused(rows.following, rows.count, logits.shape[-1]).to(logits.device)
    masked = logits.masked_fill_(refused, -torch.inf)
    if not rows.params.min_tokens:
        return masked
    empty = masked.amax(dim=-1, keepdim=True) == -torch.inf
    return torch.where(empty, own.float().masked_fill(refused, -torch.inf), masked)


def _penalized(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    params, vocab = rows.params, logits.shape[-1]
    split = rows.prompt_length
    output = [*rows.tokens[split:], *rows.following[: rows.settled]]
    counts = _ids(output, logits).bincount(minlength=vocab).repeat(rows.count, 1)
    for row, token in enumerate(rows.following[rows.settled :], start=1):
        counts[row:, token] += 1
    if params.repetition_penalty != 1.0:
        seen = counts > 0
        seen[:, _ids(rows.tokens[:split], logits)] = True
        scaled = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, scaled, logits)
    if params.frequency_penalty:
        logits = logits - params.frequency_penalty * counts
    if params.presence_penalty:
        logits = logits - params.presence_penalty * (counts > 0)
    return logits


def _ids(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)
