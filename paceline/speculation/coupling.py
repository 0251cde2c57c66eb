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

Near-ties. The integers are equal on every device. The logarithms are taken in float64, so that two devices
disagree by a few units in the last place of a double, 1e-15; logits computed by different kernels, or for another
shape of batch, differ far more: about 1e-5 in float32, 1e-2 in bfloat16. Either can change the draw only where the
two best scores are that close. The gap between them has a density of at most 1 near 0 (the difference of two
Gumbels), so logits apart by d change about a share d of the draws, and from that token on an output goes its own
way. Nothing here can prevent it; what it amounts to is measured (tests/serve/test_same_tokens.py).

The generator is SplitMix64 (Steele, Lea, Flood 2014): a 64-bit counter stepped by the golden ratio and
finalized by a bijective mix. The counter is the token id; its starting point is a mix of seed and position.

In torch this is about a millisecond of a core for a row of 49152 tokens, so on a CPU a kernel draws (`draws`) where
there is a compiler. Torch's way is the definition, and the way of every other device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from paceline.seeds import GOLDEN, MIX_1, MIX_2, mix
from paceline.speculation import draws
from paceline.speculation.draws import UNDECIDED, DrawKernel
from paceline.speculation.processing import Unfiltered, survivors
from paceline.types import SamplingParams

_POSITION_STEP = 0xD1342543DE82EF95  # odd, unrelated to GOLDEN: positions and token ids walk different orbits


def gumbel(seed: int, positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Gumbel(0, 1) noise of every token id at each position: float64 [len(positions), vocab_size]."""
    return _to_gumbel(random_bits(seed, positions, vocab_size, device))


def random_bits(
    seed: int, positions: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """64 random bits of every token id at each position: int64 [len(positions), vocab_size], bit-equal everywhere."""
    starts = torch.tensor([signed(_start(seed, position)) for position in positions], dtype=torch.int64)
    return _bits(starts.to(device), torch.arange(vocab_size, device=device)[None])


def draw(logits: torch.Tensor, params: SamplingParams, positions: Sequence[int]) -> list[int]:
    """The token of each row of one request, drawn for the given positions.

    `logits` is [n, vocab]; `positions[i]` is the index, from the start of the prompt, of the token that row i
    draws. `params.seed` must be set unless greedy. Returns n token ids.
    """
    found: list[int] = draw_rows(logits, [params] * len(logits), positions).tolist()
    return found


def draw_rows(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The token of each row, of whatever request: int64 [n] on the logits' device.

    `params` and `positions` have an entry for each row; see `draw`. `ids`, int64 [m] and ascending, are the tokens of
    the m columns of `logits`, None for 0, 1, …. Others cannot be drawn, and the rest is as if they had -inf.
    """
    found = kernel() if DrawKernel.takes(logits) else "for float32 on a CPU"
    if isinstance(found, str):
        columns = columns_by_definition(logits, params, positions, ids)
    else:
        columns, decided = found.draw(logits, params, counters(params, positions), ids)
        if not decided:
            left = (columns == UNDECIDED).nonzero()[:, 0]
            its = [params[n] for n in left.tolist()], [positions[n] for n in left.tolist()]
            columns[left] = columns_by_definition(logits[left], *its, ids)
    return columns if ids is None else ids[columns]


def columns_by_definition(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The column of each row's token, in torch: int64 [n]. Arguments are those of `draw_rows`.

    Noise is computed only for the tokens the filters left, since it is a function of their ids.
    """
    greedy = [p.greedy for p in params]
    if all(greedy):
        return logits.argmax(dim=-1)
    if not any(greedy):
        return _draw_sampled(logits, params, positions, ids)
    columns = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    rows = _where(greedy, logits.device)
    columns[rows] = logits[rows].argmax(dim=-1)
    drawing = _where([not g for g in greedy], logits.device)
    columns[drawing] = _draw_sampled(
        logits[drawing],
        [p for p, g in zip(params, greedy, strict=True) if not g],
        [p for p, g in zip(positions, greedy, strict=True) if not g],
        ids,
    )
    return columns


@cache
def kernel() -> DrawKernel | str:
    """What draws on a CPU, or why torch does."""
    found = draws.build()
    return found if isinstance(found, str) or _right(found) else "this compiler builds it wrong"


def accept(candidates: Sequence[int], drawn: Sequence[int]) -> int:
    """How many candidates stand: the length of the run in which each equals what the target drew there.

    `drawn` has one more entry than `candidates`: after an accepted run comes the target's own next token.
    """
    assert len(drawn) == len(candidates) + 1
    for n, candidate in enumerate(candidates):
        if candidate != drawn[n]:
            return n
    return len(candidates)


def _right(kernel: DrawKernel) -> bool:
    """Whether a few rows come out right: of vectorizing code like this, compilers have bugs."""
    logits = 3 * torch.randn(32, 1000, generator=torch.Generator().manual_seed(0))
    each = SamplingParams(seed=1), SamplingParams(seed=2, top_k=40), SamplingParams(seed=3, temperature=0.7, top_p=0.9)
    params, positions = [*each, SamplingParams(seed=4, min_p=0.02)] * 8, range(32)
    columns, _ = kernel.draw(logits, params, counters(params, positions), None)
    return torch.equal(columns, columns_by_definition(logits, params, positions))


def _draw_sampled(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], ids: torch.Tensor | None
) -> torch.Tensor:
    """The columns drawn."""
    starts = torch.tensor([signed(x) for x in counters(params, positions)], dtype=torch.int64).to(logits.device)
    columns = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    everyone = torch.arange(logits.shape[-1], device=logits.device)[None]
    for part in survivors(logits, params, lazy=True):
        places = everyone if isinstance(part, Unfiltered) or part.ids is None else part.ids
        totals = _to_gumbel(_bits(starts[part.rows], places if ids is None else ids[places])).add_(part.scores)
        best = totals.argmax(dim=-1)
        if isinstance(part, Unfiltered):
            best = _best_kept(part, totals, best)
        columns[part.rows] = places.expand_as(totals).gather(-1, best[:, None])[:, 0]
    return columns


def _best_kept(part: Unfiltered, totals: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Of each row the best of `totals` among the tokens the filters leave: if it is not the first, then the next, …

    Tokens no likelier than one that is not left are not left either.
    """
    while not bool((kept := part.keeps(best)).all()):
        failed = ~kept
        edge = part.scores[failed].gather(-1, best[failed, None])
        totals[failed] = totals[failed].masked_fill_(part.scores[failed] <= edge, -torch.inf)
        best[failed] = totals[failed].argmax(dim=-1)
    return best


def _where(wanted: Sequence[bool], device: torch.device) -> torch.Tensor:
    return torch.tensor([n for n, found in enumerate(wanted) if found], device=device)


def counters(params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Where the counter of each row starts, in 64 bits; 0 if it is greedy."""
    return [0 if p.greedy else _start(_seed(p), position) for p, position in zip(params, positions, strict=True)]


def _seed(params: SamplingParams) -> int:
    assert params.seed is not None, "a seed is fixed where a request enters"
    return params.seed


def _start(seed: int, position: int) -> int:
    """Where the counter of a position starts, in 64 bits."""
    return mix(mix(seed) + (position + 1) * _POSITION_STEP)


def starts(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where the counters of many rows start: uint64 [n], of uint64 [n] each."""
    with np.errstate(over="ignore"):
        return _mix(_mix(seeds) + (positions + np.uint64(1)) * np.uint64(_POSITION_STEP))


def _mix(x: np.ndarray) -> np.ndarray:
    """`paceline.seeds.mix` of each."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _bits(starts: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of each row's token ids, [n or 1, m]: the output of its generator after that many steps and one."""
    x = (ids + 1).mul_(signed(GOLDEN)) + starts[:, None]
    x = (x ^ _shift_right(x, 30)).mul_(signed(MIX_1))
    x = (x ^ _shift_right(x, 27)).mul_(signed(MIX_2))
    return x ^ _shift_right(x, 31)


def _to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    # 53 bits to the middle of their cell in (0, 1): never 0, never 1, and finest near 0, where argmax looks.
    u = _shift_right(bits, 11).to(torch.float64).add_(0.5).mul_(2.0**-53)
    return u.neg_().log1p_().neg_().log_().neg_()


def signed(x: int) -> int:
    """The int64 with the same bits."""
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)
