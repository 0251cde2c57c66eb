"""Models whose weights stay in their files, against the same models loaded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from paceline.models import load_causal_lm, load_config
from paceline.models.lazy import empty_causal_lm, with_weights_in_files
from tests import tiny

IDS = torch.tensor([tiny.prompt(9)])


def saved(path: Path, shard: str = "1GB", **overrides: Any) -> LlamaForCausalLM:
    model = tiny.tiny_llama(**overrides)
    model.save_pretrained(path, max_shard_size=shard)
    return model


def opened(path: Path) -> PreTrainedModel:
    found = lazy(path)
    assert not isinstance(found, str), found
    return found


def lazy(path: Path) -> PreTrainedModel | str:
    return with_weights_in_files(empty_causal_lm(load_config(path), dtype=torch.float32), path)


def rewrite(path: Path, **changed: torch.Tensor | None) -> None:
    """Weights by their last two names, `norm_weight`; None takes one out."""
    weights = load_file(path / "model.safetensors")
    for short, weight in changed.items():
        (name,) = {name for name in weights if name.endswith(f".{short.replace('_', '.')}")} or {short}
        weights.pop(name, None)
        if weight is not None:
            weights[name] = weight
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def whole(path: Path) -> PreTrainedModel:
    return load_causal_lm(path, dtype=torch.float32, device="cpu", attn_implementation="eager")


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_are_those_of_the_model_loaded_whole(tmp_path: Path, shard: str, tied: bool, dtype: torch.dtype) -> None:
    tiny.tiny_llama(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert torch.equal(logits(opened(tmp_path)), logits(whole(tmp_path)))


def test_weights_are_dropped_after_they_ran(tmp_path: Path) -> None:
    saved(tmp_path)
    model = opened(tmp_path)
    logits(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_head_stored_beside_the_embedding_it_is_said_to_be_is_its_own(tmp_path: Path) -> None:
    saved(tmp_path)
    config = load_config(tmp_path)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    assert torch.equal(logits(opened(tmp_path)), logits(whole(tmp_path)))


def test_a_weight_no_module_has_is_ignored(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, inv_freq=torch.zeros(4))
    assert torch.equal(logits(opened(tmp_path)), logits(whole(tmp_path)))


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, norm_weight=None)
    assert lazy(tmp_path) == "its files hold 1 weights under other names (model.norm.weight)"


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, norm_weight=torch.zeros(7))
    assert "model.norm.weight is F32 [7]" in str(lazy(tmp_path))


def test_codes_of_a_quantization_are_no_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, norm_weight=torch.zeros(48, dtype=torch.int8))
    assert "model.norm.weight is I8" in str(lazy(tmp_path))


def test_a_quantized_checkpoint_is_loaded_whole(tmp_path: Path) -> None:
    model = saved(tmp_path)
    model.config.quantization_config = {"quant_method": "fp8"}
    empty = empty_causal_lm(model.config, dtype=torch.float32)
    assert with_weights_in_files(empty, tmp_path) == "its checkpoint is fp8's"


@pytest.mark.parametrize("content", [b"", b"\x00" * 64])
def test_damaged_files_are_told(tmp_path: Path, content: bytes) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "cannot be read weight by weight" in str(lazy(tmp_path))


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "cannot be read weight by weight" in str(lazy(tmp_path))
