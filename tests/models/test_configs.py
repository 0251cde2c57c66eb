"""A configuration by every name a model has, without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from paceline.errors import ModelError
from paceline.models import ModelFiles
from paceline.models.configs import find_config
from tests import tiny as models
from tests.models.tiny_gguf import FEED_FORWARD, HIDDEN


def written(folder: Path) -> Path:
    LlamaConfig(**models.SHAPE).save_pretrained(folder)
    return folder


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    assert find_config(str(written(tmp_path))).config.hidden_size == 48


def test_a_folder_without_weights_is_none_to_read_them_from(tmp_path: Path) -> None:
    assert find_config(str(written(tmp_path))).folder is None


def test_a_folder_with_weights_is(tiny: ModelFiles) -> None:
    assert find_config(str(tiny.path)).folder == tiny.path


def test_a_config_may_have_any_name(tmp_path: Path) -> None:
    file = written(tmp_path).joinpath("config.json").rename(tmp_path / "mine.json")
    assert find_config(str(file)).config.hidden_size == 48


def test_of_a_gguf_file_the_header_is_enough(tiny_gguf: Path) -> None:
    config = find_config(str(tiny_gguf)).config
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, FEED_FORWARD)


def test_a_draft_that_comes_with_the_package_has_one() -> None:
    assert find_config("smollm2-135m-draft").config.model_type == "llama"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", "unknown model 'nonsense'"),
        ("./nowhere", "no such folder"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_what_is_no_model_says_so(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        find_config(name)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "notes.json"
    file.write_text(json.dumps({"hello": "world"}))
    with pytest.raises(ModelError, match=r"notes\.json: cannot load the config"):
        find_config(str(file))
