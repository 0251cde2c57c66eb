"""From a folder to a runner: never whole if the files allow it, and the same refusals either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from paceline.config import EngineSettings, SessionSettings
from paceline.engine import load
from paceline.engine.lean import LeanRunner
from paceline.engine.load import LoadedModel, load_model
from paceline.errors import ConfigError, ModelError
from tests import tiny
from tests.engine.families import model_of

MODEL = tiny.tiny_llama()
PROMPT = tiny.prompt(9)
LONG = tiny.prompt(100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MODEL.save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    return tmp_path


def loaded(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, EngineSettings(device="cpu", threads=1, kv_tokens=512, **options))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("loaded whole")


def rename(folder: Path, prefix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_lean_model_is_never_loaded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_causal_lm", refuse)
    assert isinstance(loaded(folder).runner, LeanRunner)


def test_weights_under_names_that_transformers_must_change_are_loaded_by_it(folder: Path) -> None:
    rename(folder, "model.")
    model = loaded(folder)
    found = tiny.run(model.engine(), tiny.request(PROMPT, ignore_eos=True))["r"]
    assert (type(model.runner), found) == (LeanRunner, tiny.generate(MODEL, PROMPT))


def test_a_missing_weight_is_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        loaded(folder)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_window_of_the_settings_holds_for_requests_without_one(folder: Path, backend: str) -> None:
    engine = loaded(folder, ctx_size=40, n_keep=2, linear_backend=backend).engine()
    plain = loaded(folder, linear_backend=backend).engine()
    found = tiny.run(engine, tiny.request(PROMPT, max_tokens=600, ignore_eos=True))["r"]
    assert found == tiny.run(plain, tiny.request(PROMPT, max_tokens=600, ignore_eos=True, ctx_size=40, n_keep=2))["r"]


def test_a_window_beyond_the_model_s_context_is_refused_by_its_key(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.ctx_size: 513 is beyond the model's context of 512") as refused:
        loaded(folder, ctx_size=513)
    assert refused.value.param == "engine.ctx_size"


def test_a_window_no_model_of_the_kind_can_have_is_refused_by_its_key(folder: Path) -> None:
    model_of("GPT-2").save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"engine\.ctx_size: no streaming window .* learned positions") as refused:
        loaded(folder, ctx_size=40)
    assert refused.value.param == "engine.ctx_size"


def test_tiers_are_those_of_the_settings(folder: Path, tmp_path: Path) -> None:
    model, place = loaded(folder), tmp_path / "kv"
    assert model.engine().restores is None
    engine = model.engine(sessions=SessionSettings(kv_disk_path=str(place), kv_tier_dtype="int8"))
    assert engine.restores is not None and engine.restores.tiers.has_files and engine.restores.tiers.quantized
    assert place.is_dir()


def test_kv_of_other_weights_is_not_used(folder: Path, tmp_path: Path) -> None:
    settings = SessionSettings(kv_disk_path=str(tmp_path / "kv"))

    def cached_after_a_restart() -> int:
        engine = loaded(folder).engine(sessions=settings)
        engine.add(tiny.request((*LONG, 5), session="s", max_tokens=1))
        ((_, delta),) = tiny.deltas(engine)
        engine.close(60.0)
        assert delta.metrics is not None
        return delta.metrics.cached_tokens

    assert [cached_after_a_restart(), cached_after_a_restart()] == [0, len(LONG)]
    weights = load_file(folder / "model.safetensors")
    save_file({name: 1.001 * weight for name, weight in weights.items()}, folder / "model.safetensors")
    assert cached_after_a_restart() == 0
