"""Same weights, same fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paceline.models import weights_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (made / "tokenizer.json").write_text("{}")
    return made


def test_a_copy_has_the_same(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_fingerprint(copy) == weights_fingerprint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_config_or_other_weights_have_another(folder: Path, name: str) -> None:
    before = weights_fingerprint(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(byte ^ 1 for byte in content))
    assert weights_fingerprint(folder) != before


def test_what_is_no_weight_does_not_count(folder: Path) -> None:
    before = weights_fingerprint(folder)
    (folder / "tokenizer.json").write_text("[]")
    assert weights_fingerprint(folder) == before
