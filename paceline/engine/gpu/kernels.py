"""Triton kernels of a decoder layer for a few rows at a time: what a step of decoding or verifying is made of.

Five launches a layer, each bound by the bytes it reads:

    norm · qkv ──► rotate · store · attend · merge ──► out + residual ──► norm · gate, up · silu ──► down + residual

A normalized row is never stored: a row's scale is taken out of the product, sum_k w_k (x_k g_k) / rms(x), and its
mean square is summed over the same pieces of x that the product reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.engine.gpu.peer_kernels import exchanged

AHEAD = tl.constexpr(4)
"""Lines of 128 bytes of each weight row that are asked for ahead."""


@triton.jit
def _fetch_ahead(addresses):
    """Ask for the lines at some addresses, so that they are in the L2 cache when they are read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def rows_linear(
    x, weight, scales, bias, norm, residual, out,
    count, outputs, inputs, eps,
    x_stride, out_stride,
    SCALED: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr, partial, counters, OVERLAPS: tl.constexpr,
    factor, slots, flags, step, slot, place, limit,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """out[r, o] = sum_i x[r, i] weight[o, i], for `count` rows, at most ROWS.

    SCALED: `weight` is int8, each output's times its `scales`, float32. NORMED: of RMS-normalized rows, times `norm`
    [inputs]. GATED: `weight` is [2 outputs, inputs], gates above ups; silu(gate) * up. ADDED: plus `residual`, [rows,
    outputs], which may be `out`. SPLIT: of the inputs between so many programs; the last to finish adds up the sums in
    `partial`. RANKS: other GPUs compute the same of other inputs, and what is added is `factor` times the sum of all
    (`peer_kernels.exchanged`). OVERLAPS: begins while the launch before ends (programmatic dependent launch, compute
    capability 9), which says so as this does.
    """
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(1)
    r = tl.arange(0, ROWS)
    in_range = o < outputs
    per_part = tl.cdiv(tl.cdiv(inputs, BLOCK_IN), SPLIT) * BLOCK_IN
    first = part * per_part
    last = tl.minimum(first + per_part, inputs)
    if OVERLAPS:
        # Weights do not depend on the launch before: the first are on their way while it ends.
        lines = tl.minimum(first + tl.arange(0, AHEAD) * 64, inputs - 1)
        rows_of = weight + tl.minimum(o, outputs - 1)[:, None].to(tl.int64) * inputs
        _fetch_ahead(rows_of + lines[None, :])
        if GATED:
            _fetch_ahead(rows_of + outputs.to(tl.int64) * inputs + lines[None, :])
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    ups = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        inside = i < last
        w = tl.load(
            weight + o[:, None].to(tl.int64) * inputs + i[None, :], mask=in_range[:, None] & inside[None, :], other=0.0
        )
        if GATED:
            u = tl.load(
                weight + (o[:, None] + outputs).to(tl.int64) * inputs + i[None, :],
                mask=in_range[:, None] & inside[None, :],
                other=0.0,
            )
        xt = tl.load(x + r[None, :] * x_stride + i[:, None], mask=(r[None, :] < count) & inside[:, None], other=0.0)
        if NORMED:
            wide = xt.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            g = tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)
            xt = (wide * g[:, None]).to(xt.dtype)
        acc = tl.dot(w.to(x.dtype.element_ty), xt, acc)
        if GATED:
            ups = tl.dot(u.to(x.dtype.element_ty), xt, ups)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT > 1:
        tl.static_assert(not GATED)
        SIZE: tl.constexpr = (BLOCK_OUT + 1) * ROWS
        places = partial + tl.program_id(0) * SPLIT * SIZE
        inner = tl.arange(0, BLOCK_OUT)[:, None] * ROWS + r[None, :]
        tl.store(places + part * SIZE + inner, acc)
        if NORMED:
            tl.store(places + part * SIZE + BLOCK_OUT * ROWS + r, squares)
        tl.debug_barrier()
        done = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel")
        if done < SPLIT - 1:
            return
        tl.debug_barrier()
        tl.store(counters + tl.program_id(0), 0)
        acc = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        for other in tl.static_range(SPLIT):
            acc += tl.load(places + other * SIZE + inner, cache_modifier=".cg")
            if NORMED:
                squares += tl.load(places + other * SIZE + BLOCK_OUT * ROWS + r, cache_modifier=".cg")
    if SCALED:
        acc *= tl.load(scales + o, mask=in_range, other=0.0)[:, None]
        if GATED:
            ups *= tl.load(scales + outputs + o, mask=in_range, other=0.0)[:, None]
    if NORMED:
        scale = tl.rsqrt(squares / inputs + eps)
        acc *= scale[None, :]
        ups *= scale[None, :]
    if GATED:
        gate = acc.to(x.dtype.element_ty).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(x.dtype.element_ty).to(tl.float32)
        acc = gate * ups.to(x.dtype.element_ty).to(tl.float32)
    if BIASED:
        acc += tl.load(bias + o, mask=in_range, other=0.0).to(tl.float32)[:, None]
    keep = in_range[:, None] & (r[None, :] < count)
    at = r[None, :] * out_stride + o[:, None]
    if RANKS > 1:
        own, here = acc.to(x.dtype.element_ty), place + tl.program_id(0) * RANKS
        acc = factor * exchanged(own, at, keep, slots, flags, step, slot, here, limit, RANK, RANKS, SLOT)
    if ADDED:
        acc = acc.to(x.dtype.element_ty).to(tl.float32) if RANKS == 1 else acc
        acc += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _turned(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _normed(low, high, weight, eps, d, whole, DIM: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of one head, as two halves, rounded where the model's own code rounds."""
    by = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM + eps)[:, None]
    w_low = tl.load(weight + d, mask=whole, other=0.0).to(tl.float32)[None, :]
    w_high = tl.load(weight + DIM // 2 + d, mask=whole, other=0.0).to(tl.float32)[None, :]
    return (low * by).to(dtype).to(tl.float32) * w_low, (high * by).to(dtype).to(tl.float32) * w_high


@triton.jit
def _scored(
    scores, seen, j, position, softcap, window, slope,
    CAPPED: tl.constexpr, SLIDING: tl.constexpr, SLOPED: tl.constexpr,
):  # fmt: skip
    """Scaled products as scores, -inf where a row does not see a key."""
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    if SLOPED:
        scores += slope[:, None] * (j[None, :] - position[:, None]).to(tl.float32)
    if SLIDING:
        seen = seen & (j[None, :] > position[:, None] - window)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _absorbed(scores, v_low, v_high, best, total, low, high):
    """The running softmax of each row with some more keys."""
    higher = tl.maximum(best, tl.max(scores, axis=1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - safe[:, None])
    by = tl.exp(best - safe)
    total = total * by + tl.sum(weights, axis=1)
    low = tl.dot(weights.to(v_low.dtype), v_low, low * by[:, None])
    high = tl.dot(weights.to(v_low.dtype), v_high, high * by[:, None])
    return higher, total, low, high


@triton.jit
def paged_attention(
    q, k, v, q_stride, k_stride, v_stride, q_head_stride, k_head_stride, v_head_stride,
    keys, values, token_stride, cos, sin, out, out_stride,
    first_rows, lengths, starts, tables, table_stride,
    partial, sums, counters,
    scale, softcap, window, q_norm, k_norm, norm_eps, slopes, sinks,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, ROW_TILES: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, NEW: tl.constexpr,
    ROTATES: tl.constexpr, NORMED: tl.constexpr, CAPPED: tl.constexpr, SLIDING: tl.constexpr,
    SLOPED: tl.constexpr, SUNK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attention of ragged windows over paged keys and values; stores the windows' own on the way.

    Program (split and tile of rows, kv head, window). The window's `lengths` tokens are the rows of `q`, `k` and `v`
    from `first_rows` on, at positions `starts` and after. `keys` and `values` are one layer's, [slots, KV_HEADS, DIM]:
    token p of a window is in slot tables[p / BLOCK] BLOCK + p mod BLOCK. The splits share the tokens before the
    window; the last has the window's own, too, and takes them from `k` and `v`, so that nobody waits for them to be
    stored. `cos` and `sin`, float32 [positions, DIM / 2], turn the pairs (d, d + DIM / 2). The last of the splits to
    finish adds up what all have found.
    """
    split = tl.program_id(0) % SPLIT
    row_tile = tl.program_id(0) // SPLIT
    head = tl.program_id(1)
    number = tl.program_id(2)
    count = tl.load(lengths + number)
    row = tl.load(first_rows + number)
    start = tl.load(starts + number)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    if row_tile * ROWS >= count * GROUP:
        return
    # Row m: token m / GROUP of the window, and of the query heads that share this key's the one m mod GROUP.
    m = row_tile * ROWS + tl.arange(0, ROWS)
    token = m // GROUP
    query_head = head * GROUP + m % GROUP
    live = token < count
    position = start + token
    d = tl.arange(0, HALF)
    whole = d < DIM // 2
    mask = live[:, None] & whole[None, :]
    at = q + (row + token)[:, None].to(tl.int64) * q_stride + query_head[:, None] * q_head_stride + d[None, :]
    q_low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    q_high = tl.load(at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        q_low, q_high = _normed(q_low, q_high, q_norm, norm_eps, d, whole, DIM, q.dtype.element_ty)
    if ROTATES:
        angle = position[:, None] * (DIM // 2) + d[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        q_low, q_high = _turned(q_low, q_high, c, s)
    dtype: tl.constexpr = keys.dtype.element_ty
    q_low = q_low.to(dtype)
    q_high = q_high.to(dtype)
    slope = tl.zeros((ROWS,), tl.float32)
    if SLOPED:
        slope = tl.load(slopes + query_head, mask=live, other=0.0).to(tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS, HALF), tl.float32)
    high = tl.zeros((ROWS, HALF), tl.float32)
    begin = 0
    if SLIDING:
        begin = tl.maximum(start + row_tile * ROWS // GROUP - window + 1, 0) // TILE * TILE
    # The last of several has the window's own tokens alone, which take a while of loading and turning.
    OLD: tl.constexpr = SPLIT - 1 if SPLIT > 1 else 1
    per_split = tl.cdiv(tl.cdiv(tl.maximum(start - begin, 0), TILE), OLD) * TILE
    begin += split * per_split
    end = tl.minimum(begin + per_split, start)
    if SPLIT > 1 and split == SPLIT - 1:
        end = begin
    n = tl.arange(0, TILE)
    for tile in range(begin, end, TILE):
        block = tl.load(tables + number * table_stride + tile // BLOCK).to(tl.int64)
        slot = block * BLOCK + tile % BLOCK + n
        j = tile + n
        there = j < start
        k_at = keys + slot[None, :] * token_stride + head * DIM + d[:, None]
        k_low = tl.load(k_at, mask=whole[:, None] & there[None, :], other=0.0)
        k_high = tl.load(k_at + DIM // 2, mask=whole[:, None] & there[None, :], other=0.0)
        v_at = values + slot[:, None] * token_stride + head * DIM + d[None, :]
        v_low = tl.load(v_at, mask=whole[None, :] & there[:, None], other=0.0)
        v_high = tl.load(v_at + DIM // 2, mask=whole[None, :] & there[:, None], other=0.0)
        scores = tl.dot(q_low, k_low)
        scores = tl.dot(q_high, k_high, scores) * scale
        seen = there[None, :] & live[:, None]
        scores = _scored(scores, seen, j, position, softcap, window, slope, CAPPED, SLIDING, SLOPED)
        best, total, low, high = _absorbed(scores, v_low, v_high, best, total, low, high)
    if split == SPLIT - 1:
        # Rows of the first tile store all of the window's keys; others need none beyond their own.
        need = count
        if row_tile > 0:
            need = tl.minimum(count, (row_tile * ROWS + ROWS - 1) // GROUP + 1)
        for first in range(0, need, NEW):
            i = first + tl.arange(0, NEW)
            own = i < count
            inside = own[:, None] & whole[None, :]
            new_k = k + (row + i)[:, None].to(tl.int64) * k_stride + head * k_head_stride + d[None, :]
            new_v = v + (row + i)[:, None].to(tl.int64) * v_stride + head * v_head_stride + d[None, :]
            nk_low = tl.load(new_k, mask=inside, other=0.0).to(tl.float32)
            nk_high = tl.load(new_k + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            nv_low = tl.load(new_v, mask=inside, other=0.0).to(dtype)
            nv_high = tl.load(new_v + DIM // 2, mask=inside, other=0.0).to(dtype)
            if NORMED:
                nk_low, nk_high = _normed(nk_low, nk_high, k_norm, norm_eps, d, whole, DIM, k.dtype.element_ty)
            at_i = start + i
            if ROTATES:
                turn = at_i[:, None] * (DIM // 2) + d[None, :]
                nc = tl.load(cos + turn, mask=inside, other=0.0)
                ns = tl.load(sin + turn, mask=inside, other=0.0)
                nk_low, nk_high = _turned(nk_low, nk_high, nc, ns)
            stored_low = nk_low.to(dtype)
            stored_high = nk_high.to(dtype)
            if row_tile == 0:
                own_block = tl.load(tables + number * table_stride + at_i // BLOCK, mask=own, other=0).to(tl.int64)
                place_k = (own_block * BLOCK + at_i % BLOCK)[:, None] * token_stride + head * DIM + d[None, :]
                tl.store(keys + place_k, stored_low, mask=inside)
                tl.store(keys + place_k + DIM // 2, stored_high, mask=inside)
                tl.store(values + place_k, nv_low, mask=inside)
                tl.store(values + place_k + DIM // 2, nv_high, mask=inside)
            found = tl.dot(q_low, tl.trans(stored_low))
            found = tl.dot(q_high, tl.trans(stored_high), found) * scale
            may = own[None, :] & live[:, None] & (at_i[None, :] <= position[:, None])
            found = _scored(found, may, at_i, position, softcap, window, slope, CAPPED, SLIDING, SLOPED)
            best, total, low, high = _absorbed(found, nv_low, nv_high, best, total, low, high)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT > 1:
        place = (number * KV_HEADS + head) * ROW_TILES + row_tile
        mine = place.to(tl.int64) * SPLIT + split
        r = tl.arange(0, ROWS)
        inner = r[:, None] * (2 * HALF) + d[None, :]
        tl.store(partial + mine * ROWS * 2 * HALF + inner, low, mask=live[:, None])
        tl.store(partial + mine * ROWS * 2 * HALF + inner + HALF, high, mask=live[:, None])
        tl.store(sums + mine * 2 * ROWS + r, best)
        tl.store(sums + mine * 2 * ROWS + ROWS + r, total)
        tl.debug_barrier()
        done = tl.atomic_add(counters + place, 1, sem="acq_rel")
        if done < SPLIT - 1:
            return
        tl.debug_barrier()
        tl.store(counters + place, 0)
        theirs = place.to(tl.int64) * SPLIT
        all_splits = theirs + tl.arange(0, SPLIT)
        bests = tl.load(sums + all_splits[:, None] * 2 * ROWS + r[None, :], cache_modifier=".cg")
        best = tl.max(bests, axis=0)
        safe = tl.where(best == float("-inf"), 0.0, best)
        totals = tl.load(sums + all_splits[:, None] * 2 * ROWS + ROWS + r[None, :], cache_modifier=".cg")
        total = tl.sum(totals * tl.exp(bests - safe[None, :]), axis=0)
        low = tl.zeros((ROWS, HALF), tl.float32)
        high = tl.zeros((ROWS, HALF), tl.float32)
        for other in tl.static_range(SPLIT):
            its_best = tl.load(sums + (theirs + other) * 2 * ROWS + r, cache_modifier=".cg")
            at_other = partial + (theirs + other) * ROWS * 2 * HALF + inner
            its_low = tl.load(at_other, mask=live[:, None], other=0.0, cache_modifier=".cg")
            its_high = tl.load(at_other + HALF, mask=live[:, None], other=0.0, cache_modifier=".cg")
            share = tl.exp(its_best - safe)[:, None]
            low += its_low * share
            high += its_high * share
    if SUNK:
        sink = tl.load(sinks + query_head, mask=live, other=0.0).to(tl.float32)
        higher = tl.maximum(best, sink)
        by = tl.exp(best - higher)
        total = total * by + tl.exp(sink - higher)
        low *= by[:, None]
        high *= by[:, None]
    inverse = 1.0 / total
    to = out + (row + token)[:, None].to(tl.int64) * out_stride + query_head[:, None] * DIM + d[None, :]
    tl.store(to, (low * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(to + DIM // 2, (high * inverse[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_rows(x, weight, out, width, eps, WIDE: tl.constexpr):
    """RMS norm of each row of `x`, [rows, width]; rounded to its type before the weight, as Llama's is."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDE)
    inside = i < width
    a = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    a = (a * tl.rsqrt(tl.sum(a * a, axis=0) / width + eps)).to(x.dtype.element_ty)
    g = tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + row * width + i, (a * g).to(out.dtype.element_ty), mask=inside)


@triton.jit
def widen_rows(weight, scales, out, inputs, BLOCK: tl.constexpr):
    """int8 [outputs, inputs] times float32 [outputs], in the type of `out`."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inputs
    w = tl.load(weight + row * inputs + i, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * inputs + i, (w * tl.load(scales + row)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(gate_up, out, width, BLOCK: tl.constexpr):
    """silu(gate) * up of each row of [rows, 2 width], gates first."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0)
    gated = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(out + row * width + i, gated * up, mask=inside)


@triton.jit
def rotate_rows(
    x, stride, positions, cos, sin, weights, eps, first_head,
    DIM: tl.constexpr, HALF: tl.constexpr, ROTATES: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """In place, heads [rows, first_head + head, DIM]: RMS norm by `weights`, if NORMED, and the turn to their place."""
    row = tl.program_id(0)
    d = tl.arange(0, HALF)
    whole = d < DIM // 2
    at = x + row.to(tl.int64) * stride + (first_head + tl.program_id(1)) * DIM + d[None, :]
    low = tl.load(at, mask=whole[None, :], other=0.0).to(tl.float32)
    high = tl.load(at + DIM // 2, mask=whole[None, :], other=0.0).to(tl.float32)
    if NORMED:
        low, high = _normed(low, high, weights, eps, d, whole, DIM, x.dtype.element_ty)
    if ROTATES:
        angle = tl.load(positions + row) * (DIM // 2) + d
        c = tl.load(cos + angle, mask=whole, other=0.0)[None, :]
        s = tl.load(sin + angle, mask=whole, other=0.0)[None, :]
        low, high = _turned(low, high, c, s)
    tl.store(at, low.to(x.dtype.element_ty), mask=whole[None, :])
    tl.store(at + DIM // 2, high.to(x.dtype.element_ty), mask=whole[None, :])


@triton.jit
def take_ids(ids, feeds, tokens, out, count, BLOCK: tl.constexpr):
    """out[r] = tokens[feeds[r]] where that is not negative, else ids[r]."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < count
    feed = tl.load(feeds + r, mask=inside, other=-1)
    fed = tl.load(tokens + feed, mask=inside & (feed >= 0), other=0).to(tl.int32)
    tl.store(out + r, tl.where(feed >= 0, fed, tl.load(ids + r, mask=inside, other=0)), mask=inside)
