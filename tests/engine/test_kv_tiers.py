"""The tiers' account: what is kept where, and what becomes of it."""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.kv_entry import KVEntry, KVExport, KVGeometry
from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import MIN_TOKENS, KVTiers, Restored, TierUsage
from tests.engine.by_hand import PLENTY, Tiers

GEOMETRY = KVGeometry(2, 2, 4, torch.float32, torch.device("cpu"))
SLABS = Slabs(GEOMETRY, 200)
SIZE = 80 * GEOMETRY.bytes_per_token
NOTHING = TierUsage(0, 0, 0)


def export(session: str, tokens: int = 80, first: int = 0) -> KVExport:
    """A token's key is its id, its value minus that."""
    ids = np.arange(first, first + tokens, dtype=np.int32)
    keys = torch.from_numpy(ids).float()[None, None, :, None].repeat(2, 2, 1, 4)
    return KVExport(session, ids, keys, -keys)


def fetched(tiers: Tiers, session: str) -> Restored | None:
    future: Future[Restored | None] = tiers.fetch(session, lambda _: True)
    tiers.reader.work()
    return future.result(0)


def holds(restored: Restored | None, of: KVExport) -> bool:
    assert restored is not None and restored.entry is not None
    entry = restored.entry
    same = all(torch.equal(a[:, :, : entry.held], b) for a, b in zip(entry.tensors, of.tensors, strict=True))
    return same and entry.token_ids.tolist() == of.token_ids.tolist()


def where(tiers: KVTiers) -> dict[str, str]:
    return {each.session_id: each.tier for each in tiers.sessions()}


def test_what_is_put_is_fetched() -> None:
    tiers = Tiers(SLABS)
    tiers.put(export("s"))
    assert holds(fetched(tiers, "s"), export("s"))
    tiers.work()
    assert holds(fetched(tiers, "s"), export("s"))


def test_a_few_tokens_are_not_kept() -> None:
    tiers = Tiers(SLABS)
    tiers.put(export("s", MIN_TOKENS - 1))
    assert tiers.usage() == {"host": NOTHING, "disk": NOTHING}


def test_without_a_folder_what_is_over_the_budget_is_lost() -> None:
    tiers = Tiers(SLABS, 2 * SIZE)
    for name in "abc":
        tiers.put(export(name))
    tiers.work()
    assert where(tiers) == {"b": "host", "c": "host"}
    assert (tiers.dropped, tiers.usage()["host"]) == (1, TierUsage(2, 160, 2 * SIZE))


def test_what_is_over_the_budget_goes_to_disk_least_recently_used_first(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 2 * SIZE, tmp_path)
    for name in "ab":
        tiers.put(export(name))
    fetched(tiers, "a")
    tiers.put(export("c"))
    tiers.work()
    assert where(tiers) == {"a": "host", "b": "disk", "c": "host"}
    assert holds(fetched(tiers, "b"), export("b"))


def test_on_its_way_to_disk_a_session_is_fetched_from_memory(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    tiers.put(export("s"))
    found = fetched(tiers, "s")
    assert found is not None and found.tier == "host"
    tiers.work()
    found = fetched(tiers, "s")
    assert found is not None and found.tier == "disk"


def test_a_newer_version_replaces_the_older_wherever_it_is(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    tiers.put(export("s", 80))
    tiers.work()
    tiers.put(export("s", 100))
    assert tiers.usage()["disk"] == NOTHING
    tiers.put(export("s", 120))
    tiers.work()
    assert holds(fetched(tiers, "s"), export("s", 120))
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    tiers.put(export("s"))
    tiers.work()
    (file,) = tmp_path.iterdir()
    before = file.stat().st_ino
    tiers.put(export("s"))
    tiers.work()
    assert file.stat().st_ino == before


def test_what_the_kv_cache_took_leaves_memory_and_stays_on_disk(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, SIZE, tmp_path)
    for name in "ab":
        tiers.put(export(name))
    tiers.work()
    for name in "ab":
        found = fetched(tiers, name)
        assert found is not None
        tiers.taken(found)
    assert where(tiers) == {"a": "disk"}


@pytest.mark.parametrize("when", ["waiting", "written"])
def test_a_dropped_session_is_nowhere(tmp_path: Path, when: str) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    tiers.put(export("s"))
    if when == "written":
        tiers.work()
    assert tiers.drop("s")
    tiers.work()
    assert (fetched(tiers, "s"), list(tmp_path.iterdir()), where(tiers)) == (None, [], {})
    assert not tiers.drop("s")


def test_a_file_of_another_process_is_dropped_too(tmp_path: Path) -> None:
    mine, other = Tiers(SLABS, 0, tmp_path), Tiers(SLABS, 0, tmp_path)
    mine.work()
    other.put(export("s"))
    other.work()
    mine.drop("s")
    mine.work()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_process_is_found_at_once(tmp_path: Path) -> None:
    mine, other = Tiers(SLABS, 0, tmp_path), Tiers(SLABS, 0, tmp_path)
    mine.work()
    other.put(export("s"))
    other.work()
    assert holds(fetched(mine, "s"), export("s"))


def test_files_of_the_process_before_are_taken_over(tmp_path: Path) -> None:
    before = Tiers(SLABS, 0, tmp_path)
    before.put(export("s"))
    before.work()
    after = Tiers(SLABS, 0, tmp_path)
    after.work()
    assert where(after) == {"s": "disk"}
    found = after.find(export("s").token_ids, None, None)
    assert found is not None and found.session_id == "s"


def test_a_file_that_vanished_is_forgotten(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    for name in "ab":
        tiers.put(export(name))
    tiers.work()
    for file in tmp_path.iterdir():
        file.unlink()
    assert fetched(tiers, "a") is None
    assert where(tiers) == {"b": "disk"}
    tiers.sweep()
    assert (where(tiers), tiers.broken) == ({}, 0)


def test_a_damaged_file_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)
    tiers.put(export("s"))
    tiers.work()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert [fetched(tiers, "s"), fetched(tiers, "s")] == [None, None]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert (tiers.broken, where(tiers)) == (1, {})


def test_a_full_disk_is_warned_of_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = Tiers(SLABS, 0, tmp_path)

    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(KVFiles, "write", full)
        for name in "ab":
            tiers.put(export(name))
        tiers.work()
    assert (where(tiers), tiers.dropped, len(caplog.records)) == ({}, 2, 1)
    tiers.put(export("c"))
    tiers.work()
    assert where(tiers) == {"c": "disk"}


def test_more_than_may_wait_for_the_disk_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.engine.kv_tiers.WRITE_BEHIND_BYTES", 2 * SIZE)
    tiers = Tiers(SLABS, 0, tmp_path)
    for name in "abc":
        tiers.put(export(name))
    tiers.check()
    tiers.work()
    assert (where(tiers), tiers.dropped) == ({"a": "disk", "b": "disk"}, 1)


def test_sessions_nobody_used_go_with_their_files(tmp_path: Path) -> None:
    now = 1000.0
    tiers = Tiers(SLABS, SIZE, tmp_path, ttl_s=60.0, clock=lambda: now)
    for name in "abc":
        tiers.put(export(name))
    tiers.work()
    for file in tmp_path.iterdir():
        os.utime(file, (now, now))
    now += 50.0
    fetched(tiers, "c")
    now += 20.0
    tiers.sweep()
    assert (where(tiers), list(tmp_path.iterdir())) == ({"c": "host"}, [])


def test_a_stop_writes_what_is_in_memory(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, PLENTY, tmp_path)
    tiers.put(export("s"))
    assert tiers.stop(1.0)
    assert where(tiers) == {"s": "disk"}


def test_real_threads_write_and_read(tmp_path: Path) -> None:
    tiers = KVTiers(SLABS, 0, KVFiles(tmp_path, "a model", PLENTY, 3600.0))
    tiers.put(export("s"))
    assert tiers.stop(60.0)
    after = KVTiers(SLABS, 0, KVFiles(tmp_path, "a model", PLENTY, 3600.0))
    assert holds(after.fetch("s", lambda _: True).result(60.0), export("s"))
    assert after.stop(60.0)


def test_int8_takes_a_fraction_and_comes_back_rounded(tmp_path: Path) -> None:
    tiers = Tiers(SLABS, PLENTY, tmp_path, quantized=True)
    tiers.put(export("s"))
    tiers.work()
    assert tiers.usage()["host"] == TierUsage(1, 80, 80 * GEOMETRY.quantized().bytes_per_token)
    found = fetched(tiers, "s")
    assert found is not None and found.entry is not None
    entry, exact = found.entry, export("s")
    assert entry.keys.dtype == torch.float32
    torch.testing.assert_close(entry.keys[:, :, : entry.held], exact.keys, rtol=0.005, atol=0)


def test_int8_kv_is_kept_as_it_is() -> None:
    packed = export("s").packed(quantized=True)
    tiers = Tiers(Slabs(GEOMETRY.quantized(), 200), quantized=True)
    tiers.put(packed)
    tiers.work()
    assert holds(fetched(tiers, "s"), packed)
    assert not tiers.quantized


def test_the_longest_common_prefix_is_found_and_the_session_s_own_among_equals() -> None:
    tiers = Tiers(SLABS)
    tiers.put(export("short", 80))
    tiers.put(export("long", 120))
    tiers.put(export("other", 120, first=500))
    ids = export("x", 150).token_ids

    def found(ids: np.ndarray, session: str | None) -> str | None:
        outline: KVEntry | None = tiers.find(ids, session, None)
        return outline.session_id if outline is not None else None

    assert [found(ids, None), found(ids[:80], "short"), found(ids[:80], "long")] == ["long", "short", "long"]
    assert found(ids + 1000, None) is None


names = st.sampled_from("abcd")
actions = st.one_of(
    st.tuples(st.just("put"), names, st.integers(MIN_TOKENS, 200)),
    st.tuples(st.sampled_from(("fetch", "take", "drop", "lose")), names, st.just(0)),
    st.tuples(st.sampled_from(("write", "sweep", "restart")), st.just(""), st.integers(1, 4)),
)


@settings(max_examples=60)
@given(st.lists(actions, max_size=40), st.integers(0, 3), st.integers(1, 5), st.booleans())
def test_the_account_closes_and_only_what_was_put_is_fetched(
    schedule: list[tuple[str, str, int]], host: int, disk: int, with_files: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if with_files else None
        tiers = Tiers(SLABS, host * SIZE, place, disk_bytes=disk * 2 * SIZE)
        put: dict[str, list[int]] = {name: [] for name in "abcd"}
        for action, name, number in schedule:
            if action == "put":
                tiers.put(export(name, number))
                put[name].append(number)
            elif action in ("fetch", "take") and (found := fetched(tiers, name)) is not None:
                assert len(found.export.token_ids) in put[name]
                assert holds(found, export(name, len(found.export.token_ids)))
                if action == "take":
                    tiers.taken(found)
            elif action == "drop":
                tiers.drop(name)
                tiers.writer.work()
                put[name].clear()
            elif action == "lose" and place is not None:
                (place / KVFiles(place, "a model", PLENTY, 1.0).name(name)).unlink(missing_ok=True)
            elif action == "write":
                tiers.writer.work(number)
            elif action == "sweep":
                tiers.sweep()
            elif action == "restart":
                tiers = Tiers(SLABS, host * SIZE, place, disk_bytes=disk * 2 * SIZE)
            tiers.check()
        tiers.work()
        tiers.sweep()
        files = set(Path(folder).iterdir())
        assert sum(tier == "disk" for tier in where(tiers).values()) <= len(files)
        assert sum(file.stat().st_size for file in files) <= disk * 2 * SIZE
