"""Outputs within a grammar on a GPU, drawn in the graphs of steps: valid, and the same with a draft as without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("triton", reason="Triton is not installed")

from paceline.config import EngineSettings, SpeculationSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.speculation.local import LocalProposer
from paceline.types import Request, SamplingParams
from tests import schemas, tiny
from tests.gpu.test_paged_gpu import FAMILIES, SHAPE

pytestmark = pytest.mark.gpu

FREE = SamplingParams(seed=5, max_tokens=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    path: Path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](**SHAPE | {"tie_word_embeddings": False} | FAMILIES["llama"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=schemas.tokenizer(), eos_token="<eos>").save_pretrained(path)
    found = load_model(path, EngineSettings(kv_tokens=8192, max_model_len=512, max_num_seqs=16))
    yield found
    found.close()


def requests(*, bound: bool = True, free: bool = True) -> list[Request]:
    within = [
        Request(
            f"{n}", tiny.prompt(20, n), replace(FREE, seed=n, grammar=schemas.json_schema(schemas.random_schema(n)))
        )
        for n in range(24)
    ]
    beside = [Request(f"free {n}", tiny.prompt(20, n), replace(FREE, seed=n)) for n in range(4)]
    return (within if bound else []) + (beside if free else [])


def texts(found: dict[str, list[int]]) -> dict[str, str]:
    return {name: schemas.tokenizer().decode(tokens) for name, tokens in found.items() if not name.startswith("free")}


def test_outputs_are_drawn_on_the_device_and_valid(model: LoadedModel) -> None:
    found = tiny.run(model.engine(), *requests())
    assert model.runner.launches
    ended = {name: text for name, text in texts(found).items() if len(found[name]) < FREE.max_tokens}  # type: ignore[operator]
    for name, text in ended.items():
        jsonschema.Draft202012Validator(schemas.random_schema(int(name))).validate(json.loads(text))
    assert len(ended) >= 20


def test_a_draft_changes_few_of_them(model: LoadedModel) -> None:
    """None but for near-ties, which bfloat16 has many of."""
    plain = tiny.run(model.engine(), *requests(free=False))
    settings = SpeculationSettings(depth=4, prompt_lookup_num_tokens=4)
    drafted = tiny.run(model.engine(LocalProposer(model.drafter()), settings), *requests(free=False))
    assert sum(plain[name] == drafted[name] for name in plain) >= 18
    for name, text in texts(drafted).items():
        if len(drafted[name]) < FREE.max_tokens:  # type: ignore[operator]
            jsonschema.Draft202012Validator(schemas.random_schema(int(name))).validate(json.loads(text))
