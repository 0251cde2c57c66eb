"""Coupled draws on the device: what `paceline.speculation.coupling` defines, in two launches for any batch.

Nothing here looks at a result, so a step's draws can be part of its graph and the next step can begin from tokens the
host has not seen. A row's filters need no sorting: the token drawn from all is also the one drawn from those that
the filters leave, if it is one of them, which is a count and two sums; else the next best is tried.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
"""`paceline.seeds`' constants; a kernel takes globals only in this form."""
CHUNK = 4096
"""Tokens of a program of `draw_chunks`."""
NEAR = tl.constexpr(1e-3)
"""Totals in float32 so far apart are in the same order in float64."""
MOST_TRIES = tl.constexpr(256)


@triton.jit
def _bits(start, ids):
    """64 random bits, uint64, of token ids under the counter that starts at `start`."""
    x = (ids.to(tl.int64) + 1).to(tl.uint64) * GOLDEN + start.to(tl.uint64)
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _gumbel(start, ids):
    """Gumbel(0, 1) noise, float64."""
    u = ((_bits(start, ids) >> 11).to(tl.int64).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    # -log(1 - u); its series where 1 - u would lose the digits that matter, those of the likeliest winners.
    small = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * 0.2))))
    wait = tl.where(u < 0.0009765625, small, -tl.log(1.0 - u))
    return -tl.log(wait)


@triton.jit
def _named(names, ids, inside, NAMED: tl.constexpr):
    """The tokens that columns `ids` stand for."""
    return tl.load(names + ids, mask=inside, other=0) if NAMED else ids


@triton.jit
def _values(logits, mask, masked, ids, inside):
    """A row's logits, float32; -inf outside, and in a `masked` row where its mask, 32 tokens a word, has a 0."""
    values = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    words = tl.load(mask + (ids >> 5), mask=inside & (masked != 0), other=-1)
    return tl.where(((words >> (ids & 31)) & 1) != 0, values, float("-inf"))


@triton.jit
def _totals(logits, mask, masked, names, ids, inside, start, temperature, NAMED: tl.constexpr):
    """What a row's draw maximizes, float64; -inf outside. Greedy rows, of temperature 0, have no noise."""
    values = _values(logits, mask, masked, ids, inside)
    found = values.to(tl.float64)
    if temperature > 0:
        found = _gumbel(start, _named(names, ids, inside, NAMED)) + (values / temperature).to(tl.float64)
    return tl.where(inside, found, float("-inf"))


@triton.jit
def draw_chunks(
    logits, stride, vocab, masks, words, masked, names, starts, temperatures, best,
    NAMED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row): about the best total of a chunk of a row, `best` float32 [rows, chunks].

    Rows that are `masked`, int32 [rows], have masks in `masks`, int32 [rows, words]: a bit for each column. `names`,
    int32 [vocab], are the tokens of the columns if they are NAMED. In float32, where logarithms are cheap: within some
    1e-5 of what `_totals` says.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(starts + row)
    temperature = tl.load(temperatures + row)
    bound = tl.load(masked + row)
    mask = masks + row.to(tl.int64) * words
    i = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        ids = chunk * CHUNK + first + i
        inside = ids < vocab
        values = _values(logits + row.to(tl.int64) * stride, mask, bound, ids, inside)
        if temperature > 0:
            # All 53 bits, rounded: a small u, of the likeliest winners, keeps its digits; 1 - u would lose them.
            u = (2 * (_bits(start, _named(names, ids, inside, NAMED)) >> 11).to(tl.int64) + 1).to(
                tl.float32
            ) * 5.551115123125783e-17
            wait = tl.where(u < 0.001, u * (1.0 + u * (0.5 + u * 0.33333334)), -tl.log(1.0 - u))
            values = values / temperature - tl.log(wait)
        top = tl.maximum(top, tl.where(inside, values, float("-inf")))
    tl.store(best + row * tl.num_programs(0) + chunk, tl.max(top, axis=0))


@triton.jit
def draw_rows(
    logits, stride, vocab, masks, words, masked, names, starts, temperatures, log_min_ps, top_ps, top_ks,
    best, chunks, tokens,
    NAMED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): the best of the row that its filters leave, looked for where `draw_chunks` found the best.
    `tokens` int64 [rows]."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    mine = logits + row.to(tl.int64) * stride
    bound = tl.load(masked + row)
    mask = masks + row.to(tl.int64) * words
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, CHUNKS)
    found = tl.load(best + row * chunks + c, mask=c < chunks, other=float("-inf"))
    near = tl.max(found, axis=0) - NEAR
    value = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    chunk = tl.min(tl.where(found >= near, c, CHUNKS), axis=0)
    while chunk < CHUNKS:
        leading = tl.full((BLOCK,), float("-inf"), tl.float64)
        at = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, CHUNK, BLOCK):
            ids = chunk * CHUNK + first + i
            sums = _totals(mine, mask, bound, names, ids, ids < vocab, start, tl.load(temperatures + row), NAMED)
            at = tl.where(sums > leading, ids, at)
            leading = tl.maximum(leading, sums)
        lead = tl.max(leading, axis=0)
        # Of equal ones the first.
        if lead > value:
            token = tl.min(tl.where(leading == lead, at, 2147483647), axis=0)
            value = lead
        chunk = tl.min(tl.where((found >= near) & (c > chunk), c, CHUNKS), axis=0)
    temperature = tl.load(temperatures + row)
    log_min_p = tl.load(log_min_ps + row)
    top_p = tl.load(top_ps + row)
    top_k = tl.load(top_ks + row)
    filtered = (temperature > 0) & ((top_p < 1) | (top_k > 0) | (log_min_p > float("-inf")))
    if filtered:
        tops = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            scores = _values(mine, mask, bound, first + i, first + i < vocab) / temperature
            tops = tl.maximum(tops, scores)
        highest = tl.max(tops, axis=0)
        tries = 0
        while tries < MOST_TRIES:
            own = tl.load(mine + token) / temperature
            count = tl.zeros((BLOCK,), tl.int32)
            above = tl.zeros((BLOCK,), tl.float64)
            total = tl.zeros((BLOCK,), tl.float64)
            for first in range(0, vocab, BLOCK):
                scores = _values(mine, mask, bound, first + i, first + i < vocab) / temperature
                mass = tl.exp(scores - highest).to(tl.float64)
                total += mass
                above += tl.where(scores > own, mass, 0.0)
                count += (scores > own).to(tl.int32)
            all_mass = tl.sum(total, axis=0)
            kept = (tl.sum(above, axis=0) < top_p * all_mass) | (top_p >= 1)
            kept = kept & (own >= highest + log_min_p) & ((top_k <= 0) | (tl.sum(count, axis=0) < top_k))
            # A row with a NaN or an infinity has no distribution; whatever it gets, it must get it now.
            kept = kept | (all_mass != all_mass) | (all_mass == float("inf"))
            tries += 1
            if kept:
                tries = MOST_TRIES
            else:
                next_best = tl.full((BLOCK,), float("-inf"), tl.float64)
                place = tl.zeros((BLOCK,), tl.int32)
                for first in range(0, vocab, BLOCK):
                    others = first + i
                    scores = _values(mine, mask, bound, others, others < vocab) / temperature
                    left = (others < vocab) & (scores > own)
                    rest = _totals(mine, mask, bound, names, others, left, start, temperature, NAMED)
                    place = tl.where(rest > next_best, others, place)
                    next_best = tl.maximum(next_best, rest)
                second = tl.max(next_best, axis=0)
                token = tl.min(tl.where(next_best == second, place, 2147483647), axis=0)
    tl.store(tokens + row, token.to(tl.int64))
