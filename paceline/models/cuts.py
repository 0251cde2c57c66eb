"""Where a model is cut between ranks: ranges of heads, of an MLP's width and of the vocabulary. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from paceline.errors import ConfigError

PARAM = "engine.tensor_parallel_size"
GROUP = 32
"""Inputs that our packed weights keep together."""
ROWS = (32, 8, 1)
"""Rows of the vocabulary that are kept together, if there are enough of them."""

Ranges = tuple[range, ...]
"""One for each rank."""


def head_ranges(heads: int, kv_heads: int, size: int) -> tuple[Ranges, Ranges]:
    """Each rank's query heads and KV heads: whole KV heads with all queries of each, the first ranks one more than the
    last where they do not divide; or, with fewer KV heads than ranks, an equal part of one KV head's queries, and a
    copy of that head.

    Raises ConfigError, with the sizes that work, if neither is possible.
    """
    if not _divides(heads, kv_heads, size):
        works = ", ".join(str(n) for n in range(1, heads + 1) if _divides(heads, kv_heads, n))
        raise ConfigError(
            f"{PARAM}: {size} ranks cannot share {heads} query heads over {kv_heads} KV heads; these can: {works}",
            param=PARAM,
        )
    group = heads // kv_heads
    if size <= kv_heads:
        kept = _consecutive([kv_heads // size + (rank < kv_heads % size) for rank in range(size)])
        return tuple(range(one.start * group, one.stop * group) for one in kept), kept
    sharers = size // kv_heads
    queries = _consecutive([group // sharers] * size)
    return queries, tuple(range(rank // sharers, rank // sharers + 1) for rank in range(size))


def _divides(heads: int, kv_heads: int, size: int) -> bool:
    return size <= kv_heads or (size % kv_heads == 0 and (heads // kv_heads) % (size // kv_heads) == 0)


def width_ranges(width: int, fixed: Sequence[int], cost: int, group: int = GROUP) -> Ranges:
    """Each rank's part of an MLP's width, so that the largest share of a layer is as small as it can be.

    `fixed` is what each rank has of the layer already, `cost` what one of the width costs, both in numbers. Parts are
    multiples of `group`, or of the largest of 32, 8 and 1 that divides the width into enough of them. Raises
    ConfigError if there are more ranks than width.
    """
    size = len(fixed)
    if width < size:
        raise ConfigError(f"{PARAM}: {size} ranks cannot share an MLP of width {width}", param=PARAM)
    unit = next(unit for unit in (group, *ROWS) if width % unit == 0 and width // unit >= size)
    units = [1] * size
    loads = [load + unit * cost for load in fixed]
    for _ in range(width // unit - size):
        rank = loads.index(min(loads))
        units[rank] += 1
        loads[rank] += unit * cost
    return _consecutive([count * unit for count in units])


def row_ranges(rows: int, size: int) -> Ranges:
    """Each rank's rows of the vocabulary: equal ones if these are multiples of 8, else multiples of 32 but for the end.

    Raises ConfigError if there are more ranks than rows.
    """
    if rows < size:
        raise ConfigError(f"{PARAM}: {size} ranks cannot share a vocabulary of {rows}", param=PARAM)
    if rows % (8 * size) == 0:
        return _consecutive([rows // size] * size)
    unit = next(unit for unit in ROWS if -(-rows // unit) >= size)
    units = -(-rows // unit)
    counts = [unit * (units // size + (rank < units % size)) for rank in range(size)]
    counts[-1] -= unit * units - rows
    return _consecutive(counts)


def _consecutive(lengths: Sequence[int]) -> Ranges:
    ends = list(accumulate(lengths))
    return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))
