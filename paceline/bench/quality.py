"""How far one configuration of a model is from another on a text: perplexity, KL divergence, top-1 agreement.

p is the reference's distribution of a token, q the candidate's. A text is read in windows that overlap, as one with
a `context` of 8 and a `stride` of 4 shows; no logits are held beyond their window.

    window 1    . 1 2 3 4 5 6 7                  1, 2, … are scored, a point is only seen
    window 2            . . . . 8 9 10 11
    window 3                    . . . .  12 13   ends with the text

A window's mean stands for one observation in a standard error, since tokens of the same passage are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.bench.scorers import Scorer
from paceline.errors import ConfigError

ROWS = 64
"""Rows of logits that are compared at a time: in float64 they take 8 bytes a token of the vocabulary, several times."""
TAIL = 0.99


@dataclass(frozen=True, slots=True)
class Span:
    """One window: the tokens [begin, end) are seen, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def check_windows(context: int, stride: int) -> None:
    """Raises ConfigError."""
    if not 1 <= stride < context:
        raise ConfigError(f"--stride: {stride} is not from 1 to {context - 1}, below --context", param="stride")


def spans(tokens: int, context: int, stride: int) -> Iterator[Span]:
    """Windows of at most `context` tokens in which every token but the text's first is scored once.

    Behind the first window each has at least context - stride tokens before it. Raises ConfigError.
    """
    check_windows(context, stride)
    first, end = 1, min(context, tokens)
    while first < tokens:
        yield Span(max(0, end - context), first, end)
        first, end = end, min(end + stride, tokens)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every token scored in a window, float64 [tokens]: -log p and -log q of the token in nats, KL(p‖q) of the
    distributions it was predicted by, and 1 where both like the same token best."""

    p_loss: np.ndarray
    q_loss: np.ndarray
    kl: np.ndarray
    same: np.ndarray

    def __len__(self) -> int:
        return len(self.kl)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error; None where there is too little text to tell."""

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """What the candidate (q) differs from the reference (p) by, over `tokens` scored in `windows`.

    `change` is q's perplexity relative to p's, less 1; its error is that of the difference on the same tokens, and so
    far smaller than those of the two. `kl` and `kl_p99` are in nats a token, `agreement` is a share.
    """

    tokens: int
    windows: int
    p_perplexity: Estimate
    q_perplexity: Estimate
    change: Estimate
    kl: Estimate
    kl_p99: float
    agreement: Estimate


@torch.inference_mode()
def compare(p_logits: torch.Tensor, q_logits: torch.Tensor, following: Sequence[int]) -> Scores:
    """Logits of any float type [tokens, vocab] and the ids that followed.

    Where vocabularies are padded to different sizes, what one of them lacks is left out.
    """
    columns = min(p_logits.shape[1], q_logits.shape[1])
    ids = torch.tensor(following, device=p_logits.device)
    parts = []
    for rows in (slice(n, n + ROWS) for n in range(0, len(following), ROWS)):
        p = p_logits[rows, :columns].double().log_softmax(-1)
        q = q_logits[rows, :columns].to(p).log_softmax(-1)
        losses = (-each.gather(1, ids[rows, None]).squeeze(1) for each in (p, q))
        # p is 0 where its logit is -inf: such a token adds nothing, whatever q says of it.
        kl = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
        same = (p.argmax(-1) == q.argmax(-1)).double()
        parts.append(torch.stack((*losses, kl, same)))
    return Scores(*torch.cat(parts, dim=1).cpu().numpy())


def mean(values: Sequence[np.ndarray]) -> Estimate:
    """The mean over all values, and its standard error from how the windows' sums scatter.

    The windows' sizes differ, so it is a ratio of two sums: Cochran, Sampling Techniques, 6.4.
    """
    sums, sizes = np.array([each.sum() for each in values]), np.array([len(each) for each in values])
    value = float(sums.sum() / sizes.sum())
    count = len(values)
    if count < 2:
        return Estimate(value, None)
    scatter = float(((sums - value * sizes) ** 2).sum())
    return Estimate(value, math.sqrt(scatter * count / (count - 1)) / float(sizes.sum()))


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, its error to first order."""
    value = math.exp(estimate.value)
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def summarize(windows: Sequence[Scores]) -> Quality:
    """Figures over all windows, of which there is at least one."""
    growth = exponential(mean([each.q_loss - each.p_loss for each in windows]))
    return Quality(
        tokens=sum(len(each) for each in windows),
        windows=len(windows),
        p_perplexity=exponential(mean([each.p_loss for each in windows])),
        q_perplexity=exponential(mean([each.q_loss for each in windows])),
        change=Estimate(growth.value - 1.0, growth.error),
        kl=mean([each.kl for each in windows]),
        kl_p99=float(np.quantile(np.concatenate([each.kl for each in windows]), TAIL)),
        agreement=mean([each.same for each in windows]),
    )


def measure(
    reference: Scorer,
    candidate: Scorer,
    ids: Sequence[int],
    *,
    context: int,
    stride: int,
    prefix: int = 0,
    on_scored: Callable[[int, int], None] = lambda *_: None,
) -> Quality:
    """Both read the same windows of `ids`. The first `prefix` tokens of the text (a beginning-of-sequence token that a
    model cannot do without) begin every window, in place of its own.

    `on_scored` hears after each window how many tokens are scored, and of how many. Raises ConfigError if a window is
    longer than a model takes, or the text has nothing to predict.
    """
    limit = min(reference.longest, candidate.longest)
    if context > limit:
        raise ConfigError(f"--context: {context} is beyond the {limit} tokens both models take", param="context")
    if len(ids) < 2:
        raise ConfigError(f"--text: {len(ids)} tokens leave nothing to predict", param="text")
    found = []
    for span in spans(len(ids), context, stride):
        seen = [*ids[:prefix], *ids[span.begin + prefix : span.end - 1]]
        following = ids[span.first : span.end]
        p = reference.logits(seen, len(following))
        found.append(compare(p, candidate.logits(seen, len(following)), following))
        on_scored(span.end - 1, len(ids) - 1)
    return summarize(found)
