"""From rows of logits to tokens, for the target and for the draft alike: history in, token ids out.

    logits ── min_tokens, logit_bias, penalties ── temperature, top-k, top-p, min-p ── coupled noise ──► token
              (this module; they need the history)  (processing)                        (coupling)

Inside a verification window each row has its own history: the tokens agreed on, then the candidates above
it. Row by row that is what plain decoding would see, so speculation changes nothing about the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from paceline.speculation import coupling
from paceline.types import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Rows:
    """The `count` consecutive rows of logits that draw tokens of one sequence.

    The last row draws the token after `tokens` and `following`, each row above it one token earlier. The
    first `prompt_length` of `tokens` are the prompt.
    """

    params: SamplingParams
    prompt_length: int
    tokens: Sequence[int]
    following: Sequence[int] = ()
    count: int = 1

    @property
    def positions(self) -> range:
        """Of the tokens drawn, from the start of the prompt."""
        end = len(self.tokens) + len(self.following)
        return range(end - self.count + 1, end + 1)

    @property
    def settled(self) -> int:
        """How many of `following` every row has in its history."""
        return len(self.following) - self.count + 1


def draw(logits: torch.Tensor, batch: Sequence[Rows]) -> list[list[int]]:
    """The tokens of each member of a batch, in order; `logits` is [sum of counts, vocab].

    All rows are drawn together, whatever their parameters, and come back in one copy.
    """
    params, positions = by_row(batch)
    tokens = iter(coupling.draw_rows(adjust_all(logits, batch), params, positions).tolist())
    return [[next(tokens) for _ in range(rows.count)] for rows in batch]


def draw_runs(logits: torch.Tensor, batch: Sequence[Rows]) -> list[list[int]]:
    """As `draw`, but of each member only up to the first token that is not the candidate there: the accepted run and
    one token more. A member's `following` are all its candidates; it has a row for each and one more.

    A sampled row takes about a millisecond of a core, and what is behind a refused candidate is of no use. So on a
    CPU rows are drawn in rounds: of every member the first, of those that go on the next two, four, … A GPU draws
    them all at once.
    """
    if logits.device.type != "cpu" or all(rows.params.greedy or rows.count == 1 for rows in batch):
        drawn = draw(logits, batch)
        return [run[: coupling.accept(rows.following, run) + 1] for run, rows in zip(drawn, batch, strict=True)]
    logits = adjust_all(logits, batch)
    starts = [0, *accumulate(rows.count for rows in batch)]
    runs: list[list[int]] = [[] for _ in batch]
    going, begin, end = list(range(len(batch))), 0, 1
    while going:
        places = [(n, place) for n in going for place in range(begin, min(end, batch[n].count))]
        at = torch.tensor([starts[n] + place for n, place in places])
        params, positions = [batch[n].params for n, _ in places], [batch[n].positions[place] for n, place in places]
        for (n, place), token in zip(places, coupling.draw_rows(logits[at], params, positions).tolist(), strict=True):
            # Only if every candidate before it stood.
            if runs[n] == list(batch[n].following[:place]):
                runs[n].append(token)
        begin, end = end, 2 * end + 1
        going = [n for n in going if begin < batch[n].count and runs[n] == list(batch[n].following[:begin])]
    return runs


def by_row(batch: Sequence[Rows]) -> tuple[list[SamplingParams], list[int]]:
    """Parameters and position of every row."""
    params = [rows.params for rows in batch for _ in range(rows.count)]
    return params, [position for rows in batch for position in rows.positions]


def adjust_all(logits: torch.Tensor, batch: Sequence[Rows]) -> torch.Tensor:
    """`adjust` for every member: [sum of counts, vocab], the same tensor if nobody wants it."""
    if not any(rows.params.adjusts for rows in batch):
        return logits
    adjusted, start = logits.float().clone(), 0
    for rows in batch:
        end = start + rows.count
        if rows.params.adjusts:
            adjusted[start:end] = adjust(logits[start:end], rows)
        start = end
    return adjusted


def adjust(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Logits after min_tokens, bias and penalties: float32 [count, vocab]; the same tensor if none is set.

    Order and formulas are vLLM's; the repetition penalty is also Transformers' (Keskar et al. 1909.05858).
    """
    params = rows.params
    if not params.adjusts:
        return logits
    logits = logits.float().clone()
    _mask_ends(logits, rows)
    for token, bias in params.bias.items():
        if token < logits.shape[-1]:
            logits[:, token] += bias
    if params.penalizes:
        logits = _penalized(logits, rows)
    return logits


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


def _mask_ends(logits: torch.Tensor, rows: Rows) -> None:
    """Rows with fewer than `min_tokens` before them draw none of `stop_token_ids`; an engine adds EOS to these."""
    missing = rows.params.min_tokens - (rows.positions[0] - rows.prompt_length)
    ends = [token for token in rows.params.stop_token_ids if token < logits.shape[-1]]
    if missing > 0 and ends:
        logits[:missing, ends] = -torch.inf


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
