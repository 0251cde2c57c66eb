from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.errors import ModelError
from paceline.models import ModelFiles, catalogue, resolve

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the names a model folder has."""
    path = tmp_path / "my-model"
    path.mkdir()
    for name in FILES:
        (path / name).write_text("{}")
    return path


def complaint(name: str | Path, cache: Path, *, download: bool = True) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(str(name), cache=cache, download=download)
    return caught.value.message


def test_folder_is_used_where_it_is(folder: Path) -> None:
    assert resolve(str(folder)) == ModelFiles("my-model", folder)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    message = complaint("gpt-17", tmp_path)
    assert all(entry.name in message for entry in catalogue())


def test_unknown_name_says_what_else_may_be_given(tmp_path: Path) -> None:
    assert complaint("gpt-17", tmp_path).endswith("a model folder, a .gguf file or a Hub id owner/name")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert complaint("./nowhere", tmp_path) == "./nowhere: no such folder"


def test_folder_without_config_is_no_model_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in complaint(folder, folder)


def test_folder_with_a_gguf_file_points_at_the_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "weights.gguf").touch()
    assert str(folder / "weights.gguf") in complaint(folder, folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled (pytorch_model.bin)" in complaint(folder, folder)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in complaint(folder, folder)


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files missing (model-2.safetensors)" in complaint(folder, folder)


def test_folder_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer files" in complaint(folder, folder)


def test_missing_gguf_file_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "a.gguf", tmp_path) == f"{tmp_path}/a.gguf: no such file"


def test_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    assert complaint(tmp_path / "a.gguf", tmp_path).endswith("not a GGUF file")


def test_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-00002-of-00003.gguf").write_bytes(b"GGUF")
    assert "one part of a split GGUF" in complaint(tmp_path / "a-00002-of-00003.gguf", tmp_path)


def test_other_single_file_is_refused(folder: Path) -> None:
    assert "a single file" in complaint(folder / "model.safetensors", folder)


def test_without_download_an_absent_model_names_the_command(tmp_path: Path) -> None:
    assert complaint("smollm2-135m", tmp_path, download=False).endswith("paceline models pull smollm2-135m")


def test_without_download_an_unconverted_gguf_names_the_command(tiny_gguf: Path, tmp_path: Path) -> None:
    assert complaint(tiny_gguf, tmp_path, download=False).endswith(f"paceline models pull {tiny_gguf}")


def test_unreachable_index_is_one_line_with_a_remedy(no_index: None, tmp_path: Path) -> None:
    message = complaint("smollm2-135m", tmp_path)
    assert "check the network" in message and "\n" not in message


def test_cache_that_is_a_file_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert str(tmp_path / "cache") in complaint("smollm2-135m", tmp_path / "cache")


@pytest.mark.parametrize(
    ("number", "remedy"), [("ENOSPC", "disk full"), ("EROFS", "no permission; set PACELINE_CACHE"), ("EIO", "error")]
)
def test_file_system_errors_are_one_line(
    number: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = getattr(errno, number)
    monkeypatch.setattr("paceline.models.resolver.install", raising(OSError(code, os.strerror(code), "/disk/file")))
    message = complaint("smollm2-135m", tmp_path)
    assert message.startswith("/disk/file: ") and remedy in message


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail
