"""`device_map: auto`: a model larger than its device, with what has no room left on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.engine import load
from paceline.engine.attention import AttentionStep, Scoring
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.spread import AttentionElsewhere, SpreadRunner
from paceline.models.spread import main_device
from tests import tiny
from tests.engine.families import model_of
from tests.models import packings

PROMPT = tiny.prompt(40)
CPU = torch.device("cpu")


Squeeze = Callable[[PreTrainedModel], PreTrainedModel]


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> Squeeze:
    """A machine with room for six tenths of the model given."""

    def squeeze(model: PreTrainedModel) -> PreTrainedModel:
        size = sum(weight.nbytes for weight in model.parameters())
        monkeypatch.setattr(load, "free_memory", lambda _: int(0.6 * size / load.WEIGHTS_SHARE_OF_FREE_MEMORY))
        return model

    return squeeze


def loaded(folder: Path, model: PreTrainedModel, **options: Any) -> LoadedModel:
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return from_folder(folder, **options)


def from_folder(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, EngineSettings(device="cpu", threads=1, kv_tokens=512, device_map="auto", **options))


def tokens(model: LoadedModel, *prompts: Sequence[int]) -> list[list[int]]:
    requests = [tiny.request(tuple(prompt), str(n), ignore_eos=True) for n, prompt in enumerate(prompts)]
    found = tiny.run(model.engine(), *requests)
    return [found[str(n)] for n in range(len(prompts))]


def device(model: LoadedModel) -> str:
    return next(choice.value for choice in model.choices if choice.name == "device")


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_partly_on_disk_gives_the_same_tokens(tmp_path: Path, too_large: Squeeze, tied: bool) -> None:
    reference = too_large(tiny.tiny_llama(tie_word_embeddings=tied))
    model = loaded(tmp_path, reference)
    assert isinstance(model.runner, SpreadRunner)
    assert "cpu" in device(model) and "disk" in device(model)
    other = tiny.prompt(17, seed=1)
    assert tokens(model, PROMPT, other) == [tiny.generate(reference, each) for each in (PROMPT, other)]


def test_a_family_with_attention_of_its_own_is_spread_too(tmp_path: Path, too_large: Squeeze) -> None:
    reference = too_large(model_of("Falcon 7B"))
    model = loaded(tmp_path, reference)
    assert isinstance(model.runner, PerSequenceRunner)
    assert "disk" in device(model)
    assert tokens(model, PROMPT) == [tiny.generate(reference, PROMPT)]


@pytest.mark.parametrize("named", [False, True])
def test_unpacked_integers_are_spread_through_a_folder(
    tmp_path: Path, too_large: Squeeze, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    folder, offloaded = tmp_path / "model", tmp_path / "offloaded"
    folder.mkdir()
    offloaded.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(offloaded))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    reference = too_large(packings.write(folder, settings, packings.gptq))
    tiny.save_tokenizer(folder)
    model = from_folder(folder, offload_folder=str(offloaded) if named else None)
    assert "disk" in device(model) and any(each.is_file() for each in offloaded.rglob("*"))
    assert tokens(model, PROMPT) == [tiny.generate(reference, PROMPT)]


def test_a_model_that_has_room_is_on_one_device(tmp_path: Path) -> None:
    model = loaded(tmp_path, tiny.tiny_llama())
    assert (type(model.runner).__name__, device(model)) == ("ModelRunner", "cpu")


def test_inputs_go_where_the_model_runs_not_where_its_weights_wait(tmp_path: Path, too_large: Squeeze) -> None:
    model = loaded(tmp_path, too_large(tiny.tiny_llama()))
    assert isinstance(model.runner, SpreadRunner)
    assert {weight.device.type for weight in model.runner.model.parameters()} == {"cpu", "meta"}
    assert (main_device(model.runner.model), model.runner.device) == (CPU, CPU)


class Seen(AttentionStep):
    """Notes where it was asked for what."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        tensors = (query, key, value, *(() if scoring.sinks is None else (scoring.sinks,)))
        self.devices += [each.device.type for each in tensors]
        return torch.zeros(query.shape)


def test_attention_is_computed_where_the_kv_is() -> None:
    seen, q = Seen(), torch.zeros(1, 2, 3, 4)
    AttentionElsewhere(seen, torch.device("meta")).attend(0, q, q, q, Scoring(1.0, sinks=torch.zeros(2)))
    assert seen.devices == ["meta"] * 4
