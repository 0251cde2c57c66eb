"""The Triton kernel of `stream_attention`; importing this needs Triton."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def attend_streams(
    query,
    keys,
    values,
    out,
    start,
    at,
    scale,
    stream_stride,
    head_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes one KV head of one stream: softmax over the tokens from start to at, block by block."""
    program = tl.program_id(0).to(tl.int64)
    stream, head = program // KV_HEADS, program % KV_HEADS
    last = tl.load(at)
    first = tl.minimum(tl.load(start + stream), last)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    mine = program * GROUP * DIM + rows[:, None] * DIM + dims[None, :]
    q = tl.load(query + mine, mask=rows[:, None] < GROUP, other=0.0)
    base = stream * stream_stride + head * head_stride
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    for block in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        index = block + tl.arange(0, BLOCK)
        seen = (index >= first) & (index <= last)
        here = base + index[:, None] * token_stride + dims[None, :]
        k = tl.load(keys + here, mask=seen[:, None], other=0.0)
        v = tl.load(values + here, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        best = higher
    tl.store(out + mine, (sums / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < GROUP)
