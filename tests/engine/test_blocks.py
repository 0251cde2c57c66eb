"""Keys and values in blocks of 16 tokens: rooms are whole blocks, and every block is somebody's or free."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.key_shift import KeyShift, Rotation
from paceline.engine.kv_blocks import BlockPool
from paceline.engine.kv_cache import KVEntry, KVExport, KVGeometry, SlabKVCache
from paceline.engine.kv_memory import Slabs
from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow

BLOCK = 16
GEOMETRY = KVGeometry(2, 2, 4, torch.float32, torch.device("cpu"))


def cache(blocks: int = 8, *, quantized: bool = False, block: int = BLOCK) -> SlabKVCache:
    geometry = GEOMETRY.quantized() if quantized else GEOMETRY
    pool = BlockPool(geometry, blocks * block, block)
    return SlabKVCache(geometry, blocks * block, max_model_len=100, shift=KeyShift((None, None)), memory=pool)


def pool_of(kv: SlabKVCache) -> BlockPool:
    assert isinstance(kv.memory, BlockPool)
    return kv.memory


def compute(kv: SlabKVCache, entry: KVEntry, tokens: list[int]) -> None:
    """Stand in for a forward pass: a token's key is its id."""
    ids = torch.tensor(tokens, dtype=torch.float32)[None, :, None].expand(2, -1, 4)
    for layer in range(2):
        entry.write(layer, entry.held, ids, -ids)
    kv.append(entry, tokens)


def filled(kv: SlabKVCache, tokens: list[int], session: str | None = None) -> KVEntry:
    entry = kv.reserve([*tokens, 0], len(tokens) + 1, session)
    assert entry is not None
    compute(kv, entry, tokens[entry.length :])
    return entry


def keys_of(entry: KVEntry) -> list[float]:
    """As a kernel finds them: by the table."""
    pool = entry.keys.transpose(1, 2)[1]
    positions = range(entry.held)
    slots = [entry.blocks[p // entry.block] * entry.block + p % entry.block for p in positions]
    found: list[float] = pool[slots, 0, 0].tolist()
    return found


def export_of(kv: SlabKVCache, session: str) -> KVExport:
    export = kv.export_session(session)
    assert export is not None
    return export


def test_a_room_is_whole_blocks() -> None:
    entry = cache().reserve([0], 17)
    assert entry is not None and (entry.charged, entry.room, len(entry.blocks)) == (32, 32, 2)


def test_a_cache_over_blocks_has_the_room_that_its_blocks_have() -> None:
    """So that what it takes on as fitting it fits, when it is empty."""
    kv = SlabKVCache(GEOMETRY, 40, 100, memory=BlockPool.with_room(GEOMETRY, 40, BLOCK))
    assert kv.usage().total == 48
    assert kv.reserve(list(range(47)), 48) is not None


def test_capacity_that_is_no_whole_block_is_not_used() -> None:
    assert BlockPool(GEOMETRY, 47, BLOCK).capacity == 32


def test_an_extension_that_fits_its_last_block_takes_none() -> None:
    kv = cache()
    entry = kv.reserve([0], 17)
    assert entry is not None and kv.extend(entry, 30) and len(entry.blocks) == 2


def test_an_extension_keeps_the_blocks_it_had() -> None:
    kv = cache()
    entry, other = filled(kv, list(range(10))), kv.reserve([1], 5)
    before = list(entry.blocks)
    assert other is not None and kv.extend(entry, 40)
    assert (entry.blocks[:1], keys_of(entry)) == (before, [float(n) for n in range(10)])


def test_a_release_gives_back_what_is_not_filled() -> None:
    kv = cache()
    entry = kv.reserve([1], 90)
    assert entry is not None
    compute(kv, entry, list(range(20)))
    kv.release(entry)
    assert (entry.charged, kv.usage().free) == (32, 6 * 16)
    kv.check()


def test_blocks_that_were_given_back_serve_others_who_leave_the_rest_alone() -> None:
    kv = cache(4)
    kv.release(filled(kv, [7] * 30, "old"))
    kept = filled(kv, list(range(30)), "kept")
    new = filled(kv, [9] * 30, "new")
    assert (keys_of(new), keys_of(kept)) == ([9.0] * 30, [float(n) for n in range(30)])
    assert set(kv.sessions()) == {"kept", "new"}


def test_a_fork_has_blocks_of_its_own() -> None:
    kv = cache()
    kv.release(filled(kv, list(range(40)), "s"))
    fork = kv.reserve([*range(20), 99], 30, "t")
    assert fork is not None and keys_of(fork) == [float(n) for n in range(20)]
    compute(kv, fork, [99])
    again = kv.reserve([*range(40), 0], 41, "s")
    assert again is not None and keys_of(again) == [float(n) for n in range(40)]
    kv.check()


@pytest.mark.parametrize("quantized", [False, True])
def test_an_export_is_the_same_from_blocks_and_from_slabs(quantized: bool) -> None:
    geometry = GEOMETRY.quantized() if quantized else GEOMETRY
    slabs = SlabKVCache(geometry, 128, max_model_len=100)
    exports = []
    for kv in (slabs, cache(quantized=quantized)):
        filled(kv, list(range(20)), "s")
        exports.append(export_of(kv, "s"))
    assert all(map(torch.equal, exports[0].tensors, exports[1].tensors))


@pytest.mark.parametrize("quantized", [False, True])
def test_an_import_lies_in_blocks(quantized: bool) -> None:
    kv, other = cache(quantized=quantized), cache(quantized=quantized, block=5)
    filled(kv, list(range(20)), "s")
    assert other.import_session(export_of(kv, "s"))
    other.check()
    entry = other.reserve([*range(20), 0], 21, "s")
    assert entry is not None
    keys, _ = entry.read(1, slice(0, 20), torch.float32)
    assert keys[0, :, 0].tolist() == pytest.approx(list(range(20)), rel=1e-2)


def test_an_import_counts_its_last_block_whole() -> None:
    kv, other = cache(), cache(2)
    filled(kv, list(range(20)), "s")
    filled(other, [1] * 10)  # one block of two: a slab of 20 tokens would fit 22
    assert not other.import_session(export_of(kv, "s"))
    other.check()


def test_what_is_adopted_is_copied_into_blocks() -> None:
    kv, other = cache(), cache()
    filled(kv, list(range(20)), "s")
    assert other.adopt(Slabs(GEOMETRY, 64).filled(export_of(kv, "s")))
    other.check()
    assert (other.usage().cached, other.match([*range(20), 0], "s")) == (32, 20)


def test_what_is_evicted_of_sessions_is_spilled_before_its_blocks_are_free() -> None:
    spilled: list[KVExport] = []
    kv = SlabKVCache(GEOMETRY, 64, 100, spill=spilled.append, memory=BlockPool(GEOMETRY, 64, BLOCK))
    kv.release(filled(kv, list(range(40)), "s"))
    filled(kv, [9] * 40)
    (export,) = spilled
    assert export.keys[1, 0, :, 0].tolist() == [float(n) for n in range(40)]


@pytest.mark.parametrize("ctx_size", [16, 20, 40])
def test_a_window_ends_before_its_blocks_do(ctx_size: int) -> None:
    kv, window = cache(), StreamingWindow(ctx_size, 4, 8)
    entry = kv.reserve([0], ctx_size, window=window)
    assert entry is not None and entry.left == ctx_size
    compute(kv, entry, list(range(ctx_size)))
    assert (entry.left, entry.full) == (0, True)
    with pytest.raises(EngineError, match="past its reservation"):
        kv.append(entry, [1])
    kv.shift(entry)
    assert (entry.left, keys_of(entry)) == (8, [float(n) for n in range(ctx_size) if not 4 <= n < 12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_shift_turns_keys_in_blocks_as_in_slabs(dtype: torch.dtype) -> None:
    geometry = KVGeometry(1, 2, 4, dtype, torch.device("cpu"))
    shift, window = KeyShift((Rotation(torch.tensor([1.0, 0.1])),)), StreamingWindow(20, 4, 8)
    found = []
    for memory in (None, BlockPool(geometry, 64, BLOCK)):
        kv = SlabKVCache(geometry, 64, 64, shift, memory=memory)
        entry = kv.reserve([0], 20, window=window)
        assert entry is not None
        brought = torch.randn(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))
        entry.write(0, 0, *brought.to(torch.float32 if dtype == torch.int8 else dtype))
        kv.append(entry, list(range(20)))
        kv.shift(entry)
        found.append(entry.taken(slice(0, entry.held)))
    assert all(map(torch.equal, *found))


def test_static_blocks_are_one_a_sequence() -> None:
    kv = cache(2, block=100)
    entries = [kv.reserve([n], 5) for n in range(3)]
    assert [entry is not None for entry in entries] == [True, True, False]


def test_a_pool_without_room_says_so() -> None:
    with pytest.raises(EngineError, match="3 blocks are asked for, 2 are free"):
        BlockPool(GEOMETRY, 32, BLOCK).entry(48, None, None)


def test_a_block_that_is_lost_is_found_missing() -> None:
    kv = cache()
    entry = filled(kv, [1] * 20)
    pool_of(kv)._free.pop()
    with pytest.raises(EngineError, match="2 blocks held and 5 free, of 128 tokens"):
        kv.check()
    assert entry.blocks


def test_a_charge_for_other_room_is_found() -> None:
    kv = cache()
    filled(kv, [1] * 20).charged = 16
    kv._in_use = 16
    with pytest.raises(EngineError):
        kv.check()


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "extend", "compute", "truncate", "release", "drop", "export", "evict"]),
        st.integers(0, 3),
        st.integers(1, 40),
    ),
    max_size=50,
)


@settings(max_examples=80)
@given(operations, st.sampled_from([2, 7, 16]))
def test_any_order_of_calls_closes_the_account(calls: list[tuple[str, int, int]], block: int) -> None:
    kv = cache(112 // block, block=block)
    running: dict[int, KVEntry] = {}
    for name, who, n in calls:
        session = f"s{who}"
        if name == "reserve" and who not in running:
            # Few distinct ids, so that prefixes are shared often.
            if entry := kv.reserve([k // 20 + who % 2 for k in range(n)], n + 4, session):
                running[who] = entry
        elif name == "evict":
            kv.evict(n)
        elif who in running:
            _act(kv, running, name, who, n)
        elif name == "drop":
            kv.drop_session(session)
        elif name == "export" and (export := kv.export_session(session)) is not None:
            kv.import_session(dataclasses.replace(export, session_id="s9"))
        kv.check()
        for entry in running.values():
            assert keys_of(entry) == entry.token_ids.tolist()
    for entry in running.values():
        kv.release(entry)
    assert kv.evict(kv.usage().total)
    assert sorted(pool_of(kv)._free) == list(range(112 // block))


def _act(kv: SlabKVCache, running: dict[int, KVEntry], name: str, who: int, n: int) -> None:
    entry = running[who]
    if name == "extend":
        kv.extend(entry, min(100, entry.length + n))
    elif name == "compute":
        compute(kv, entry, [k // 20 for k in range(min(n, entry.left))])
    elif name == "truncate":
        kv.truncate(entry, n)
    elif name == "release":
        kv.release(running.pop(who))
