"""Triton kernels that sum and share among the GPUs of one host through each other's memory, over NVLink.

Every rank writes what it has into the others' memory and sets a flag there, waits for theirs, and reads its own memory:
a few rows take 3.5 us, where NCCL's all-reduce takes 16 (two H200s). A flag is the number of the step, so that nothing
need ever be cleared. What one exchange left is overwritten two exchanges later, when its reader has long gone on:
nobody can be further ahead than the exchange that the others have begun.

Addresses of the others' memory are data: int64 [SIZE], this rank's own among them. The flags of an exchange begin at
its `place`: SIZE for each program, which meets the programs of its number on the other ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin_step(step):
    """The next step's number. Never 0, which is what flags are before the first."""
    tl.store(step, tl.load(step) + 1)


@triton.jit
def _wait(flag, step, limit):
    """Until a flag is the step's number; after `limit` ns the launch fails, and with it whatever is to be done."""
    began = tl.extra.cuda.globaltimer()
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") != step:
        if tl.extra.cuda.globaltimer() - began > limit:
            tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def exchanged(
    own, at, inside, slots, flags, step, slot, place, limit, RANK: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr
):  # fmt: skip
    """The sum, float32, of what all ranks' programs of this `place` have at `at`, in the order of ranks.

    `slots` hold SLOT numbers for each rank, several times (`slot`); `flags` one for each rank from `place` on.
    """
    kind = own.dtype
    for other in tl.static_range(1, SIZE):
        peer = (RANK + other) % SIZE
        there = tl.load(slots + peer).to(tl.pointer_type(kind))
        tl.store(there + (slot * SIZE + RANK) * SLOT + at, own, mask=inside)
    number = tl.load(step)
    tl.debug_barrier()
    for other in tl.static_range(1, SIZE):
        peer = (RANK + other) % SIZE
        flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + place + RANK
        tl.atomic_xchg(flag, number, sem="release", scope="sys")
    for other in tl.static_range(1, SIZE):
        peer = (RANK + other) % SIZE
        _wait(tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + place + peer, number, limit)
    tl.debug_barrier()
    here = tl.load(slots + RANK).to(tl.pointer_type(kind)) + slot * SIZE * SLOT + at
    total = tl.zeros(own.shape, dtype=tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            total += tl.load(here + rank * SLOT, mask=inside, volatile=True).to(tl.float32)
    return total


@triton.jit
def sum_peers(
    x, y, scale, slots, flags, step, slot, place, count, limit,
    RANK: tl.constexpr, SIZE: tl.constexpr, SLOT: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """x = sum of all ranks' y; ADDED: x += scale times that. `count` numbers, as many on every rank."""
    pid = tl.program_id(0)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    if OVERLAPS:
        # This grid is small: the next one's weights may be on their way meanwhile.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    own = tl.load(y + at, mask=inside)
    total = exchanged(own, at, inside, slots, flags, step, slot, place + pid * SIZE, limit, RANK, SIZE, SLOT)
    if ADDED:
        total = tl.load(x + at, mask=inside).to(tl.float32) + scale * total
    tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)


@triton.jit
def share_columns(
    part, outs, flags, done, step, place, width, first, stride,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put [rows, width] at the columns from `first` on of every rank's `outs`, float32 [rows, stride].

    The last program to finish, of those `done` counts, sets the flags that `await_peers` waits for.
    """
    pid, row = tl.program_id(0), tl.program_id(1)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(part + row.to(tl.int64) * width + at, mask=inside)
    for rank in tl.static_range(SIZE):
        out = tl.load(outs + rank).to(tl.pointer_type(tl.float32))
        tl.store(out + row.to(tl.int64) * stride + first + at, values, mask=inside)
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(done, 1, sem="acq_rel", scope="sys") == programs - 1:
        tl.store(done, 0)
        number = tl.load(step)
        for other in tl.static_range(1, SIZE):
            peer = (RANK + other) % SIZE
            flag = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + place + RANK
            tl.atomic_xchg(flag, number, sem="release", scope="sys")


@triton.jit
def await_peers(flags, step, place, limit, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Until all the others have shared their columns."""
    number = tl.load(step)
    for other in tl.static_range(1, SIZE):
        peer = (RANK + other) % SIZE
        own = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + place + peer
        _wait(own, number, limit)


@triton.jit
def take_rows(ids, table, out, first, last, width, BLOCK: tl.constexpr):
    """Row by row what `table` [last - first, width] has for an id, zeros for ids it has not."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row)
    held = (token >= first) & (token < last)
    values = tl.load(table + (token - first).to(tl.int64) * width + at, mask=held & (at < width), other=0.0)
    tl.store(out + row.to(tl.int64) * width + at, values, mask=at < width)
