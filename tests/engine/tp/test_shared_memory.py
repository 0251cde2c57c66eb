"""Ranks in processes of their own compute together, through shared memory and through gloo."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from paceline.engine.tp.group import Group
from paceline.engine.tp.shared_memory import SLOT_BYTES
from paceline.errors import EngineError
from tests.engine.tp.ranks import Ranks, gathered, nothing, part, ranks, summed

SHAPES = [(1, 768), (7,), (0, 768), (3, SLOT_BYTES // 4), (1, SLOT_BYTES // 2 + 13)]
HIDDEN = (6, 768)
SHORT_S = 1.0
"""Long enough for ranks that are there."""


@pytest.fixture(scope="module", params=["shm", "gloo"])
def pair(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with ranks(2, request.param) as both:
        yield both


@pytest.fixture(scope="module")
def shared() -> Iterator[Ranks]:
    with ranks(3) as three:
        yield three


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_has_the_sum(pair: Ranks, shape: tuple[int, ...]) -> None:
    total = (part(0, shape) + part(1, shape)).flatten().tolist()
    assert pair.do(partial(summed, shape=shape)) == [total, total]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(pair: Ranks, dtype: torch.dtype) -> None:
    halves = [part(rank, HIDDEN).to(dtype).float() for rank in (0, 1)]
    total = (halves[0] + halves[1]).to(dtype).float().flatten().tolist()
    assert pair.do(partial(summed, shape=HIDDEN, dtype=dtype)) == [total, total]


@pytest.mark.parametrize("widths", [(4, 4), (5, 3), (1, 6)])
def test_columns_are_side_by_side_on_every_rank(pair: Ranks, widths: tuple[int, ...]) -> None:
    table = torch.cat([part(rank, (3, width)) for rank, width in enumerate(widths)], dim=1).tolist()
    assert pair.do(partial(gathered, rows=3, widths=widths)) == [table, table]


def test_rows_longer_than_a_slot_are_gathered(shared: Ranks) -> None:
    widths = (SLOT_BYTES // 4 + 5, 3, SLOT_BYTES // 8)
    table = torch.cat([part(rank, (3, width)) for rank, width in enumerate(widths)], dim=1).tolist()
    assert shared.do(partial(gathered, rows=3, widths=widths)) == [table] * 3


def test_three_ranks_are_summed_in_their_order(shared: Ranks) -> None:
    total = ((part(0, HIDDEN) + part(1, HIDDEN)) + part(2, HIDDEN)).flatten().tolist()
    assert shared.do(partial(summed, shape=HIDDEN)) == [total] * 3


def test_all_ranks_get_the_same_bits(shared: Ranks) -> None:
    first, *others = shared.do(partial(summed, shape=(512, 768)))
    assert others == [first, first]


def many(group: Group, rounds: int) -> list[float]:
    """Sums of changing sizes in a row, each of the one before."""
    x = torch.ones(3000) * (group.rank + 1)
    for number in range(rounds):
        group.all_reduce(x[: 1 + number * 7 % 3000]).div_(group.size)
    return x.tolist()


def test_no_call_reads_what_the_next_one_writes(shared: Ranks) -> None:
    x = [torch.ones(3000) * (rank + 1) for rank in range(3)]
    for number in range(2000):
        head = slice(0, 1 + number * 7 % 3000)
        total = ((x[0][head] + x[1][head]) + x[2][head]) / 3
        for each in x:
            each[head] = total
    assert shared.do(partial(many, rounds=2000)) == [each.tolist() for each in x]


def native(group: Group) -> list[float]:
    assert group.native_sum is not None
    function, argument = group.native_sum
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(function)
    x = part(group.rank, HIDDEN)
    return [float(call(argument, x.data_ptr(), x.numel())), *x.flatten().tolist()]


def test_kernels_get_the_same_sum_from_the_c_function(shared: Ranks) -> None:
    sums = shared.do(partial(summed, shape=HIDDEN))
    assert shared.do(native) == [[0.0, *each] for each in sums if isinstance(each, list)]


def test_gloo_has_no_c_function() -> None:
    with ranks(1, "gloo") as alone:
        assert alone.group.native_sum is None


def mapped_names(group: Group) -> list[str]:
    """Files of this process's mappings that are memory, but for semaphores, which libraries make."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm" in line or "/memfd:" in line}
    return sorted(name for name in names if not name.startswith("/dev/shm/sem."))


def test_the_memory_has_no_name_that_could_be_left_behind(shared: Ranks) -> None:
    assert shared.do(mapped_names) == [["/memfd:paceline-ranks (deleted)"]] * 3


def closed(group: Group) -> list[str]:
    group.close()
    return mapped_names(group)


def test_closing_frees_the_memory() -> None:
    with ranks(2) as both:
        both.peers[0].tell(closed)
        assert both.peers[0].answer() == []


def test_a_closed_group_is_refused() -> None:
    with ranks(1) as alone:
        alone.group.close()
        with pytest.raises(ValueError, match="closed"):
            alone.group.all_reduce(torch.ones(1))


def test_a_sum_of_every_other_number_is_refused(shared: Ranks) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        shared.group.all_reduce(torch.ones(8)[::2])


def test_columns_of_another_width_than_said_are_refused(shared: Ranks) -> None:
    with pytest.raises(ValueError, match=r"\[rows, widths\[0\]\]"):
        shared.group.all_gather(torch.ones(2, 3), [4, 4, 4])


def test_a_rank_that_does_not_join_ends_the_wait_with_its_number() -> None:
    with ranks(2, timeout_s=SHORT_S) as both:
        both.do(nothing)
        with pytest.raises(EngineError, match="rank 1 did not join within 1 s"):
            both.group.all_reduce(torch.ones(3))


def test_a_gather_ends_by_the_deadline_too() -> None:
    with ranks(2, timeout_s=SHORT_S) as both:
        both.do(nothing)
        with pytest.raises(EngineError, match="rank 1 did not join within 1 s"):
            both.group.all_gather(torch.ones(1, 3), [3, 3])


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_ends_the_wait(signum: signal.Signals) -> None:
    with ranks(2, timeout_s=SHORT_S) as both:
        both.do(partial(summed, shape=HIDDEN))
        os.kill(both.peers[0].process.pid or 0, signum)
        with pytest.raises(EngineError, match="rank 1 did not join within 1 s"):
            both.group.all_reduce(torch.ones(3))


def test_gloo_ends_the_wait_for_a_rank_that_is_gone() -> None:
    with ranks(2, "gloo", timeout_s=SHORT_S) as both:
        both.do(partial(summed, shape=HIDDEN))
        both.peers[0].kill()
        with pytest.raises(EngineError, match="did not all join within 1 s, or are gone"):
            both.group.all_reduce(torch.ones(3))


def test_a_third_rank_learns_who_is_missing() -> None:
    with ranks(3, timeout_s=SHORT_S) as three:
        three.do(nothing)
        waiting, idle = three.peers
        waiting.tell(partial(summed, shape=HIDDEN))
        with pytest.raises(EngineError, match="rank 2 did not join"):
            three.group.all_gather(torch.ones(1, 3), [3, 3, 3])
        assert (waiting.answer(), idle.process.is_alive()) == ("rank 2 did not join within 1 s", True)


def test_a_group_that_lost_a_rank_stays_broken() -> None:
    with ranks(2) as both:
        both.do(nothing)
        both.group.abandon(1)
        for _ in range(2):
            with pytest.raises(EngineError, match="rank 1 did not join"):
                both.group.all_reduce(torch.ones(3))


def test_a_rank_known_to_be_lost_is_not_waited_for() -> None:
    with ranks(2, timeout_s=3600.0) as both:
        both.do(nothing)
        both.peers[0].kill()
        threading.Thread(target=both.group.abandon, args=(1,)).start()
        with pytest.raises(EngineError, match="rank 1 did not join"):
            both.group.all_reduce(torch.ones(3))
