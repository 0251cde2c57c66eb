"""The KV cache's account closes, and an entry's keys always belong to its token ids."""

from __future__ import annotations

import pickle
import sys

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.kv_blocks import BlockPool
from paceline.engine.kv_cache import KVEntry, KVExport, KVGeometry, SlabKVCache
from paceline.engine.kv_memory import Slabs
from paceline.errors import EngineError

GEOMETRY = KVGeometry(2, 2, 4, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True, params=["slabs", "blocks"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact here holds whatever the memory behind the cache; blocks of one token round nothing."""
    monkeypatch.setattr(sys.modules[__name__], "IN_BLOCKS", request.param == "blocks")


IN_BLOCKS = False


def cache(capacity: int = 100) -> SlabKVCache:
    pool = BlockPool(GEOMETRY, capacity, block=1) if IN_BLOCKS else None
    return SlabKVCache(GEOMETRY, capacity, max_model_len=64, memory=pool)


def compute(kv: SlabKVCache, entry: KVEntry, tokens: list[int]) -> None:
    """Stand in for a forward pass: a token's key is its id."""
    start = entry.length
    ids = torch.tensor(tokens, dtype=torch.float32)[None, :, None].expand(GEOMETRY.num_kv_heads, -1, GEOMETRY.head_dim)
    for layer in range(GEOMETRY.num_layers):
        entry.write(layer, start, ids, -ids)
    kv.append(entry, tokens)


def filled(kv: SlabKVCache, tokens: list[int], session: str | None = None) -> KVEntry:
    entry = kv.reserve([*tokens, 0], len(tokens) + 1, session)
    assert entry is not None
    compute(kv, entry, tokens[entry.length :])
    return entry


def test_a_session_with_two_entries_keeps_the_one_that_holds_both() -> None:
    kv = cache()
    second = kv.reserve(list(range(31)), 31, "s")
    assert second is not None
    kv.release(filled(kv, list(range(20)), "s"))
    compute(kv, second, list(range(30)))
    kv.release(second)
    kv.check()
    assert (kv.sessions(), kv.usage().cached) == ({"s": (30, False)}, 30)


def test_what_would_be_evicted_last_is_told_first() -> None:
    kv = cache()
    kv.release(filled(kv, [1] * 20))
    kv.release(filled(kv, [2] * 20, "s"))
    kv.release(filled(kv, [3] * 20, "t"))
    filled(kv, [4] * 5)
    assert [ids[0] for ids in kv.recent(9)] == [4, 3, 2, 1]
    assert [ids[0] for ids in kv.recent(2)] == [4, 3]


def test_what_is_told_of_entries_does_not_change_with_them() -> None:
    kv = cache()
    entry = filled(kv, [1] * 5)
    (told,) = kv.recent(1)
    kv.truncate(entry, 0)
    compute(kv, entry, [2] * 5)
    assert told.tolist() == [1] * 5


def test_a_session_finds_its_prefix_again() -> None:
    kv = cache()
    kv.release(filled(kv, list(range(20)), "s"))
    entry = kv.reserve(list(range(25)), 30, "s")
    assert entry is not None and entry.length == 20


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    kv = cache()
    kv.release(filled(kv, list(range(20)), "s"))
    entry = kv.reserve(list(range(20)), 30, "s")
    assert entry is not None and entry.length == 19


def test_a_fork_copies_keys_and_values() -> None:
    kv = cache()
    kv.release(filled(kv, list(range(20)), "s"))
    entry = kv.reserve([*range(18), 99, 98], 30, "t")
    assert entry is not None
    assert entry.taken(slice(0, 18))[0][1, 0, :, 0].tolist() == [float(n) for n in range(18)]


def test_a_running_entry_can_be_forked() -> None:
    kv = cache()
    running = filled(kv, list(range(20)), "s")
    entry = kv.reserve(list(range(30)), 30, "t")
    assert entry is not None and entry is not running and entry.length == 20


def test_the_oldest_idle_entry_goes_first() -> None:
    kv = cache(60)
    for n, name in enumerate(("old", "new")):
        kv.release(filled(kv, [n] * 25, name))
    assert kv.reserve([7] * 20, 30, "third") is not None
    assert set(kv.sessions()) == {"new", "third"}


def test_running_entries_are_never_evicted() -> None:
    kv = cache(60)
    filled(kv, [1] * 40, "s")
    assert kv.reserve([2] * 30, 30, "t") is None


def test_a_slab_commits_what_it_holds() -> None:
    wide = SlabKVCache(KVGeometry(8, 8, 64, torch.float32, torch.device("cpu")), 1 << 20, max_model_len=16384)
    before = psutil.Process().memory_info().rss
    entry = wide.reserve([1, 2, 3], 16384)
    assert entry is not None
    entry.keys[:, :, entry.at(slice(0, 3))] = 1.0
    grown_mb = (psutil.Process().memory_info().rss - before) / 2**20
    assert grown_mb < 50  # of 512 mapped


operations = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "extend", "compute", "truncate", "release", "drop"]),
        st.integers(0, 3),
        st.integers(1, 40),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(operations)
def test_any_order_of_calls_closes_the_account(calls: list[tuple[str, int, int]]) -> None:
    kv = cache(90)
    running: dict[int, KVEntry] = {}
    for name, who, n in calls:
        session = f"s{who}"
        if name == "reserve" and who not in running:
            # Few distinct ids, so that prefixes are shared often.
            entry = kv.reserve([k // 20 + who % 2 for k in range(n)], n + 4, session)
            if entry is not None:
                running[who] = entry
        elif who in running:
            _act(kv, running, name, who, n)
        elif name == "drop":
            kv.drop_session(session)
        kv.check()
        for entry in running.values():
            assert entry.taken(slice(0, entry.length))[0][0, 0, :, 0].tolist() == entry.token_ids.tolist()


def _act(kv: SlabKVCache, running: dict[int, KVEntry], name: str, who: int, n: int) -> None:
    entry = running[who]
    if name == "extend":
        kv.extend(entry, min(64, entry.length + n))
    elif name == "compute":
        compute(kv, entry, [k // 20 for k in range(min(n, entry.charged - entry.length))])
    elif name == "truncate":
        kv.truncate(entry, n)
    elif name == "release":
        kv.release(running.pop(who))


def roundtrip(kv: SlabKVCache, session: str) -> KVExport:
    export = kv.export_session(session)
    assert export is not None
    copied: KVExport = pickle.loads(pickle.dumps(export))
    return copied


def test_an_export_holds_the_valid_tokens_and_no_more() -> None:
    kv = cache()
    kv.truncate(filled(kv, list(range(20)), "s"), 7)
    export = roundtrip(kv, "s")
    assert export.token_ids.tolist() == list(range(7))
    assert (export.keys.shape, export.keys.is_contiguous()) == ((2, 2, 7, 4), True)
    assert len(pickle.dumps(export)) < export.num_bytes + 2000


def test_an_export_shares_no_memory_with_the_cache() -> None:
    kv = cache()
    entry = filled(kv, list(range(20)), "s")
    export = kv.export_session("s")
    entry.keys.zero_()
    assert export is not None and export.keys[0, 0, :, 0].tolist() == [float(n) for n in range(20)]


def test_an_unknown_session_exports_nothing() -> None:
    assert cache().export_session("s") is None


def test_an_import_is_found_by_its_session() -> None:
    kv, other = cache(), cache()
    filled(kv, list(range(20)), "s")
    assert other.import_session(roundtrip(kv, "s"))
    entry = other.reserve(list(range(30)), 40, "s")
    assert entry is not None
    assert entry.taken(slice(0, entry.length))[1][1, 1, :, 3].tolist() == [-float(n) for n in range(20)]


def test_an_import_of_another_geometry_is_refused_by_both_names() -> None:
    wider = SlabKVCache(KVGeometry(2, 2, 8, torch.float32, torch.device("cpu")), 100, 64)
    kv = cache()
    filled(kv, [1, 2, 3], "s")
    with pytest.raises(EngineError, match=r"heads of 4 in float32, where this model has .* of 8"):
        wider.import_session(roundtrip(kv, "s"))


def test_an_import_evicts_what_is_idle() -> None:
    kv, other = cache(), cache(30)
    filled(kv, list(range(20)), "s")
    other.release(filled(other, [7] * 25, "old"))
    assert other.import_session(roundtrip(kv, "s"))
    assert set(other.sessions()) == {"s"}


def test_an_import_without_room_changes_nothing() -> None:
    kv, other = cache(), cache(60)
    filled(kv, list(range(20)), "s")
    other.release(filled(other, [3] * 10, "s"))
    filled(other, [7] * 45, "busy")
    assert not other.import_session(roundtrip(kv, "s"))
    assert other.sessions() == {"s": (10, False), "busy": (45, True)}


def test_an_import_replaces_what_the_session_had() -> None:
    kv, other = cache(), cache()
    filled(kv, list(range(20)), "s")
    other.release(filled(other, [3] * 10, "s"))
    other.import_session(roundtrip(kv, "s"))
    assert (other.sessions(), other.usage().cached) == ({"s": (20, False)}, 20)


def test_anonymous_entries_are_evicted_before_sessions() -> None:
    kv = cache(60)
    kv.release(filled(kv, [1] * 25, "session"))
    kv.release(filled(kv, [2] * 25))
    kv.release(filled(kv, [3] * 25))
    assert kv.sessions() == {"session": (25, False)}


def test_a_copied_prefix_counts_as_used() -> None:
    kv = cache(90)
    for token in (1, 2):
        kv.release(filled(kv, [token] * 20))
    kv.release(filled(kv, [*[1] * 18, 3, 3], "s"))
    kv.evict(50)  # 30 are free already
    assert (kv.match([1] * 21), kv.match([2] * 21)) == (20, 0)


def test_entries_that_hold_the_same_are_kept_once() -> None:
    kv = cache()
    first, second = (filled(kv, list(range(20))) for _ in range(2))
    kv.release(first)
    kv.release(second)
    assert kv.usage().cached == 20


def test_the_longest_of_many_prefixes_is_found() -> None:
    kv = SlabKVCache(GEOMETRY, 4000, 64)
    for n in range(50):
        kv.release(filled(kv, [*range(32), *[100 + n] * 16, 5]))
    entry = kv.reserve([*range(32), *[120] * 16, 6], 60)
    assert entry is not None and entry.length == 32 + 16


def test_an_edited_history_keeps_the_old_one_while_there_is_room() -> None:
    kv = cache(200)
    kv.release(filled(kv, list(range(50)), "s"))
    edited = filled(kv, [*range(10), *[99] * 10], "s")
    assert (edited.length, kv.match(list(range(51)), "s")) == (20, 50)


def test_what_is_evicted_of_sessions_is_spilled_and_nothing_else() -> None:
    spilled: list[KVExport] = []
    kv = SlabKVCache(GEOMETRY, 60, max_model_len=64, spill=spilled.append)
    kv.release(filled(kv, [1] * 20, "s"))
    kv.release(filled(kv, [2] * 20))
    kv.drop_session("s")
    kv.release(filled(kv, list(range(20)), "t"))
    assert kv.evict(60)
    (export,) = spilled
    assert (export.session_id, export.token_ids.tolist()) == ("t", list(range(20)))
    assert export.keys[1, 0, :, 0].tolist() == [float(n) for n in range(20)]
    assert export.packed().keys.is_contiguous()


def test_an_entry_from_elsewhere_is_adopted_beside_what_its_session_has() -> None:
    kv, slabs = cache(), Slabs(GEOMETRY, 64)
    other = roundtrip_of(list(range(30)), "s")
    kv.release(filled(kv, [7] * 10, "s"))
    assert kv.adopt(slabs.filled(other))
    kv.check()
    assert kv.usage().cached == 40
    entry = kv.reserve(list(range(31)), 40, "s")
    assert entry is not None and entry.length == 30


def test_what_is_adopted_replaces_what_it_begins_with_and_yields_to_what_begins_with_it() -> None:
    kv, slabs = cache(), Slabs(GEOMETRY, 64)
    kv.release(filled(kv, list(range(20)), "s"))
    for length in (30, 25):
        assert kv.adopt(slabs.filled(roundtrip_of(list(range(length)), "s")))
        kv.check()
        assert (kv.sessions(), kv.usage().cached) == ({"s": (30, False)}, 30)


def test_nothing_is_adopted_where_running_entries_leave_no_room() -> None:
    kv, slabs = cache(60), Slabs(GEOMETRY, 64)
    filled(kv, [1] * 45)
    assert not kv.adopt(slabs.filled(roundtrip_of(list(range(30)), "s")))
    kv.check()


def roundtrip_of(tokens: list[int], session: str) -> KVExport:
    kv = cache()
    filled(kv, tokens, session)
    return roundtrip(kv, session)
