"""The coupled rule: draft and target draw each token with the same noise, so equality is acceptance.

Gumbel-max (Gumbel 1954; Maddison et al. 1411.00712): with independent g_i ~ Gumbel(0, 1),

    argmax_i (log p_i + g_i)  is distributed as  p.

Here g_i is no random stream but a pure function of (request seed, position of the token drawn, token id i).
Draft and target evaluate it on their own, at the same arguments, and get the same g. The target's token is
therefore always its own draw from its own p: a candidate x ~ q is *accepted iff it equals that draw*, which
changes nothing about the draw. The output depends on the prompt, the parameters, the seed and the target's
weights; not on the draft, its speed, or whether it was there (Daliri et al. 2408.07978 call this
drafter-invariant; the acceptance probability is at least (1 - TV(p, q)) / (1 + TV(p, q))). Greedy decoding is
the case without noise.

Never combine this with rejection sampling on the same noise: that rule redraws from the residual and would
be biased by it.

The integers are equal on every device. The logarithms are taken in float64, so that two devices disagree by
a few units in the last place of a double; logits computed by different kernels differ far more (1e-5 in
float32). Both matter only where the two best scores tie that closely.

The generator is SplitMix64 (Steele, Lea, Flood 2014): a 64-bit counter stepped by the golden ratio and
finalized by a bijective mix. The counter is the token id; its starting point is a mix of seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.seeds import GOLDEN, MIX_1, MIX_2, mix
from paceline.types import SamplingParams

_POSITION_STEP = 0xD1342543DE82EF95  # odd, unrelated to GOLDEN: positions and token ids walk different orbits


def gumbel(seed: int, positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Gumbel(0, 1) noise of every token id at each position: float64 [len(positions), vocab_size]."""
    bits = random_bits(seed, positions, vocab_size, device)
    # 53 bits to the middle of their cell in (0, 1): never 0, never 1, and finest near 0, where argmax looks.
    u = ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)
    return u.neg_().log1p_().neg_().log_().neg_()


def random_bits(
    seed: int, positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """64 random bits of every token id at each position: int64 [len(positions), vocab_size], bit-equal everywhere."""
    starts = torch.tensor([_signed(_start(seed, position)) for position in positions], dtype=torch.int64, device=device)
    x = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device).mul_(_signed(GOLDEN))
    x = starts[:, None] + x[None, :]
    x = (x ^ _shift_right(x, 30)).mul_(_signed(MIX_1))
    x = (x ^ _shift_right(x, 27)).mul_(_signed(MIX_2))
    return x ^ _shift_right(x, 31)


def process_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scores from which a token is drawn: temperature, top-k, top-p, min-p, in Transformers' order.

    `logits` is float [n, vocab]; the result is float32 [n, vocab] with -inf for the tokens filtered out.
    Ties at a filter's edge stay in. Draft and target both call this, on their own logits.
    """
    scores = logits.float() / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        kth = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if params.top_p < 1.0:
        scores = scores.masked_fill(scores < _nucleus_edge(scores, params.top_p), -torch.inf)
    if params.min_p > 0.0:
        edge = scores.amax(dim=-1, keepdim=True) + torch.tensor(params.min_p).log().item()
        scores = scores.masked_fill(scores < edge, -torch.inf)
    return scores


def draw(logits: torch.Tensor, params: SamplingParams, positions: Sequence[int]) -> list[int]:
    """The token of each row, drawn for the given positions.

    `logits` is [n, vocab]; `positions[i]` is the index, from the start of the prompt, of the token that row i
    draws. `params.seed` must be set unless greedy. Returns n token ids.
    """
    if params.greedy:
        return _ints(logits.argmax(dim=-1))
    assert params.seed is not None, "a seed is fixed where a request enters"
    scores = process_logits(logits, params)
    noise = gumbel(params.seed, positions, scores.shape[-1], scores.device)
    return _ints(noise.add_(scores).argmax(dim=-1))


def accept(candidates: Sequence[int], drawn: Sequence[int]) -> int:
    """How many candidates stand: the length of the run in which each equals what the target drew there.

    `drawn` has one more entry than `candidates`: after an accepted run comes the target's own next token.
    """
    assert len(drawn) == len(candidates) + 1
    for n, candidate in enumerate(candidates):
        if candidate != drawn[n]:
            return n
    return len(candidates)


def _nucleus_edge(scores: torch.Tensor, top_p: float, first: int = 1024) -> torch.Tensor:
    """The lowest score inside the nucleus of each row, [n, 1].

    Looks among the `first` best tokens before it sorts the whole vocabulary: sorting 49152 scores costs more
    than everything else here, and a nucleus is rarely that wide.
    """
    total = scores.logsumexp(dim=-1, keepdim=True)
    width = min(first, scores.shape[-1])
    best = scores.topk(width, dim=-1).values
    mass = (best - total).exp().cumsum(dim=-1)
    if width < scores.shape[-1] and bool((mass[:, -1] < top_p).any()):
        best = scores.sort(dim=-1, descending=True).values
        mass = (best - total).exp().cumsum(dim=-1)
    # The nucleus ends with the first token that reaches top_p.
    last = (mass < top_p).sum(dim=-1, keepdim=True).clamp_(max=best.shape[-1] - 1)
    return best.gather(-1, last)


def _ints(tokens: torch.Tensor) -> list[int]:
    """In one copy from the device."""
    found: list[int] = tokens.tolist()
    return found


def _start(seed: int, position: int) -> int:
    return mix(mix(seed) + (position + 1) * _POSITION_STEP)


def _signed(x: int) -> int:
    """The int64 with the same bits."""
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)
