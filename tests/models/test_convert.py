"""A real GGUF file through the real converter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

from paceline.errors import ModelError
from paceline.models import ModelFiles, eos_token_ids, load_causal_lm, load_tokenizer, resolve
from paceline.models.convert_worker import half_if_it_fits, halve_what_is_exact
from tests.models.tiny_gguf import CHAT_TEMPLATE, EOS, EOT


def test_weights_are_those_of_the_file(tiny: ModelFiles, tiny_gguf: Path) -> None:
    stored = next(tensor for tensor in GGUFReader(str(tiny_gguf)).tensors if tensor.name == "blk.0.ffn_up.weight")
    with safe_open(tiny.path / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor("model.layers.0.mlp.up_proj.weight"), torch.tensor(stored.data))


def test_tied_embedding_is_saved_once(tiny: ModelFiles) -> None:
    with safe_open(tiny.path / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_config_names_the_type_to_compute_in(tiny: ModelFiles) -> None:
    assert json.loads((tiny.path / "config.json").read_text())["dtype"] == "float16"


def test_config_is_not_marked_as_quantized(tiny: ModelFiles) -> None:
    assert "quantization_config" not in json.loads((tiny.path / "config.json").read_text())


def test_chat_template_is_kept(tiny: ModelFiles) -> None:
    assert load_tokenizer(tiny.path).chat_template == CHAT_TEMPLATE


def test_end_of_turn_ends_an_answer_too(tiny: ModelFiles) -> None:
    assert eos_token_ids(tiny.path) == {EOS, EOT}


def test_converted_model_computes(tiny: ModelFiles) -> None:
    model = load_causal_lm(tiny.path, dtype=torch.float32, device="cpu")
    assert math.isfinite(model(torch.tensor([[5, 6, 7]])).logits.sum().item())


def test_second_resolve_finds_it_ready(tiny: ModelFiles, tiny_gguf: Path) -> None:
    assert resolve(str(tiny_gguf), cache=tiny.path.parents[1], download=False) == tiny


def test_weights_beyond_half_precision_are_not_computed_in_it() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = 1e5
    assert half_if_it_fits(model) == torch.float32  # type: ignore[arg-type]


def test_only_what_half_precision_holds_is_stored_in_it() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1.0 + 2.0**-12)
    model.bias.data.fill_(0.5)
    halve_what_is_exact(model)  # type: ignore[arg-type]
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.float16)


def test_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be converted: ") as caught:
        resolve(str(tmp_path / "broken.gguf"), cache=tmp_path)
    assert "\n" not in caught.value.message
