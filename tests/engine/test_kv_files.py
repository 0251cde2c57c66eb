"""Files of KV: what was written is read, or nothing is."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from paceline.engine.kv_entry import KVEntry, KVExport
from paceline.engine.kv_files import UNFINISHED_S, KVFiles
from paceline.errors import ConfigError, EngineError
from paceline.sessions.window import StreamingWindow

WINDOW = StreamingWindow(48, 4, 20)


def files(folder: Path, budget: int = 2**30, **options: Any) -> KVFiles:
    return KVFiles(folder, options.pop("identity", "a model"), budget, ttl_s=options.pop("ttl_s", 3600.0), **options)


def export(
    session: str = "s", tokens: int = 70, window: StreamingWindow | None = None, dtype: torch.dtype = torch.float32
) -> KVExport:
    held = tokens - (window.dropped(tokens) if window is not None else 0)
    chance = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(2, 3, held, 4, generator=chance).to(dtype) for _ in range(2))
    return KVExport(session, np.arange(tokens, dtype=np.int32), keys, values, window=window)


def always(outline: KVEntry) -> bool:
    return True


def read(kept: KVFiles, session: str = "s") -> KVExport | None:
    return kept.read(session, always)


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


@pytest.mark.parametrize(
    "written",
    [
        export(),
        export(window=WINDOW, tokens=130),
        export(dtype=torch.bfloat16),
        export().packed(quantized=True),
        export(session="../../etc/passwd\n\0"),
    ],
    ids=["plain", "shifted", "bfloat16", "int8", "any id"],
)
def test_what_is_written_is_read(tmp_path: Path, written: KVExport) -> None:
    kept = files(tmp_path)
    assert kept.write(written)
    found = read(kept, written.session_id)
    assert found is not None
    assert (found.session_id, found.window) == (written.session_id, written.window)
    assert found.token_ids.tolist() == written.token_ids.tolist()
    assert len(found.tensors) == len(written.tensors)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, written.tensors, strict=True))


def test_only_the_owner_may_read_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    files(folder).write(export())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(the_file(folder).stat().st_mode) == 0o600


def test_a_newer_version_replaces_the_older(tmp_path: Path) -> None:
    kept = files(tmp_path)
    kept.write(export(tokens=70))
    kept.write(export(tokens=90))
    found = read(kept)
    assert found is not None and len(found.token_ids) == 90
    assert len(list(tmp_path.iterdir())) == 1


def test_a_later_turn_that_another_process_wrote_is_kept(tmp_path: Path) -> None:
    files(tmp_path).write(export(tokens=90))
    kept = files(tmp_path)
    assert kept.write(export(tokens=70))
    found = read(kept)
    assert found is not None and len(found.token_ids) == 90


def test_another_text_replaces_a_longer_one(tmp_path: Path) -> None:
    kept, other = files(tmp_path), export(tokens=70)
    kept.write(export(tokens=90))
    other.token_ids[5] = 99
    kept.write(other)
    found = read(kept)
    assert found is not None and found.token_ids.tolist() == other.token_ids.tolist()


def test_a_session_nobody_wrote_is_none(tmp_path: Path) -> None:
    assert read(files(tmp_path)) is None


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    kept, seen = files(tmp_path), []
    kept.write(export(tokens=130, window=WINDOW))
    assert kept.read("s", lambda outline: bool(seen.append((outline.length, outline.held)))) is None
    assert seen == [(130, 130 - WINDOW.dropped(130))]


def test_another_model_s_files_are_not_found(tmp_path: Path) -> None:
    files(tmp_path).write(export())
    assert read(files(tmp_path, identity="another model")) is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(3)}, path)


def of_another_session(path: Path) -> None:
    other = files(path.parent)
    other.write(export("t"))
    (path.parent / other.name("t")).replace(path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, foreign, of_another_session])
def test_a_damaged_or_foreign_file_is_named_and_removed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    kept = files(tmp_path)
    kept.write(export())
    path = the_file(tmp_path)
    damage(path)
    with pytest.raises(EngineError, match=path.name):
        read(kept)
    assert list(tmp_path.iterdir()) == []
    assert read(kept) is None


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more than this into one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_the_disk_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    kept = files(tmp_path)
    kept.write(export(tokens=70))
    with file_size_limit(2000), pytest.raises(OSError, match="File too large"):
        kept.write(export(tokens=90))
    found = read(kept)
    assert found is not None and len(found.token_ids) == 70
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_makes_room_by_what_was_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files(tmp_path)
    for age, name in enumerate("abc"):
        kept.write(export(name))
        os.utime(tmp_path / kept.name(name), (1000.0 * age, 1000.0 * age))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert kept.write(export("d"))
    assert [read(kept, name) is not None for name in "abcd"] == [False, True, True, True]


def test_a_disk_full_of_other_things_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="No space left"):
        kept.write(export())


def test_files_over_the_budget_go_least_recently_used_first(tmp_path: Path) -> None:
    size = export().num_bytes
    kept = files(tmp_path, budget=3 * size)
    for age, name in enumerate("ab"):
        kept.write(export(name))
        os.utime(tmp_path / kept.name(name), (1000.0 * age, 1000.0 * age))
    read(kept, "a")
    kept.write(export("c"))
    assert [read(kept, name) is not None for name in "abc"] == [True, False, True]


def test_what_is_larger_than_the_budget_is_not_written(tmp_path: Path) -> None:
    assert not files(tmp_path, budget=export().num_bytes - 1).write(export())
    assert list(tmp_path.iterdir()) == []


def test_old_files_go_and_those_of_others_stay(tmp_path: Path) -> None:
    kept = files(tmp_path, ttl_s=60.0)
    kept.write(export("old"))
    kept.write(export("new"))
    os.utime(tmp_path / kept.name("old"), (0.0, 0.0))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".1-0.part").write_bytes(b"left behind")
    os.utime(tmp_path / ".1-0.part", (0.0, 0.0))
    assert kept.sweep().keys() == {kept.name("new")}
    assert {path.name for path in tmp_path.iterdir()} == {kept.name("new"), "notes.txt"}


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    unfinished = tmp_path / ".1-0.part"
    unfinished.write_bytes(b"half")
    files(tmp_path, clock=lambda: unfinished.stat().st_mtime + UNFINISHED_S - 1).sweep()
    assert unfinished.exists()


def test_removing_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    kept = files(tmp_path)
    kept.write(export())
    kept.remove("s")
    kept.remove("s")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ConfigError, match=r"sessions\.kv_disk_path: .*file cannot be written .*name a folder"
    ) as refused:
        files(tmp_path / "file")
    assert refused.value.param == "sessions.kv_disk_path"
