"""Checkpoints of GPTQ, AWQ, AutoRound and compressed-tensors mean the weights their integers and scales say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from paceline.config import EngineSettings
from paceline.errors import ConfigError, ModelError
from paceline.models import draft_folder, load_causal_lm, load_config, prequantized
from paceline.models.lazy import empty_causal_lm, with_weights_in_files
from paceline.models.prequantized import unpacked_weights
from paceline.models.quantization import LibraryQuantization
from paceline.models.unpacking import compressed
from tests import tiny
from tests.models import packings
from tests.models.packings import Integers, Tensors

IDS = torch.tensor([tiny.prompt(9)])
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
Pack = Callable[[Integers], Tensors]


def gptq_v2(layer: Integers) -> Tensors:
    return packings.gptq(layer, v2=True)


def gptq_in_order(layer: Integers) -> Tensors:
    return packings.gptq(layer, with_g_idx=False)


def packed_around_0(layer: Integers) -> Tensors:
    return packings.packed(layer, symmetric=True)


CHECKPOINTS: dict[str, tuple[dict[str, Any], Pack, dict[str, Any]]] = {
    "gptq": (GPTQ, packings.gptq, {}),
    "gptq, in order": (GPTQ, gptq_in_order, {}),
    "gptq, other groups than configured": (GPTQ | {"group_size": 64}, gptq_in_order, {}),
    "gptq, one group": (GPTQ | {"group_size": -1}, gptq_in_order, {}),
    "gptq, symmetric": (GPTQ | {"sym": True}, packings.gptq, {"symmetric": True}),
    "gptq, act-order": (GPTQ | {"desc_act": True}, packings.gptq, {"act_order": True}),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, packings.gptq, {"bits": 8}),
    "gptq, 2 bits": (GPTQ | {"bits": 2}, packings.gptq, {"bits": 2}),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq_v2, {}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, packings.awq, {"group": 64}),
    "auto-round": (AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, packings.gptq, {}),
    "auto-round, gptqmodel": (AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, gptq_v2, {}),
    "auto-round, awq": (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, packings.awq, {}),
    "pack-quantized": (
        packings.compressed_settings("pack-quantized", strategy="group", group_size=32, symmetric=False),
        packings.packed,
        {},
    ),
    "pack-quantized, symmetric": (
        packings.compressed_settings("pack-quantized", strategy="group", group_size=64),
        packed_around_0,
        {"group": 64, "symmetric": True},
    ),
    "int-quantized": (
        packings.compressed_settings("int-quantized", num_bits=8, strategy="channel"),
        packings.plain_integers,
        {"bits": 8, "symmetric": True},
    ),
}
ONE_GROUP = ("gptq, one group", "int-quantized")
"""With one scale for all inputs of an output."""


def written(path: Path, name: str) -> LlamaForCausalLM:
    settings, pack, kind = CHECKPOINTS[name]
    return packings.write(path, settings, pack, whole=name in ONE_GROUP, **kind)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_loaded_whole_has_the_weights_its_integers_mean(tmp_path: Path, name: str) -> None:
    reference = written(tmp_path, name)
    model = load_causal_lm(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_left_in_its_files_has_the_same(tmp_path: Path, name: str) -> None:
    reference = written(tmp_path, name)
    model = with_weights_in_files(empty_causal_lm(load_config(tmp_path), dtype=torch.float32), tmp_path)
    assert not isinstance(model, str), model
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpacked_weights_take_the_type_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    written(tmp_path, "gptq")
    model = load_causal_lm(tmp_path, dtype=dtype, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_a_checkpoint_in_shards_is_read(tmp_path: Path) -> None:
    reference = written(tmp_path, "gptq")
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: stored[name] for name in held}, tmp_path / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_causal_lm(tmp_path, dtype=torch.float32, device="cpu")), logits(reference))


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    written(tmp_path, "gptq")
    stored = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj"
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(gone)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 weights missing \({gone}\.weight\)"):
        load_causal_lm(tmp_path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "format marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "type mx_fp are not unpacked"),
    ],
)
def test_other_packings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    packings.write(tmp_path, settings, packings.gptq)
    with pytest.raises(ModelError, match=why):
        unpacked_weights(tmp_path, load_config(tmp_path), "cpu")


def test_integers_of_3_bits_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, "gptq")
    weights = unpacked_weights(tmp_path, load_config(tmp_path), "cpu")
    assert weights is not None
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name: tensor[:, :3] if "qzeros" in name else tensor for name, tensor in stored.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="bits are not unpacked"):
        weights.shape("model.layers.0.self_attn.q_proj.weight")


def test_a_format_of_compressed_tensors_that_is_not_ours_needs_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packings.write(tmp_path, packings.compressed_settings("nvfp4-pack-quantized"), packings.packed)
    monkeypatch.setattr(prequantized, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"need compressed-tensors; pip install paceline\[quantization\]"):
        unpacked_weights(tmp_path, load_config(tmp_path), "cpu")


@pytest.mark.parametrize(("installed", "ours"), [(True, False), (False, True)])
def test_on_a_gpu_the_library_that_wrote_it_runs_it_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, ours: bool
) -> None:
    written(tmp_path, "gptq")
    monkeypatch.setattr(prequantized, "find_spec", lambda name: name if installed else None)
    assert (unpacked_weights(tmp_path, load_config(tmp_path), "cuda") is not None) == ours


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    written(tmp_path, "awq")
    asked = LibraryQuantization(EngineSettings(quantization="bitsandbytes_4bit"))
    with pytest.raises(ConfigError, match="quantized already, by awq") as refused:
        load_causal_lm(tmp_path, dtype=torch.float32, device="cpu", quantization=asked)
    assert refused.value.param == "engine.quantization"


def test_a_distilled_draft_is_not_quantized_again() -> None:
    folder = draft_folder.shipped("smollm2-135m-draft")
    assert folder is not None
    asked = LibraryQuantization(EngineSettings(quantization="torchao_int8"))
    with pytest.raises(ConfigError, match="8 bits already"):
        load_causal_lm(folder, dtype=torch.float32, device="cpu", quantization=asked)


# ---- against the library itself

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("pack_quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "groups with zero points": (
        "pack_quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "8 bits an output": ("pack_quantized", {"num_bits": 8, "strategy": "channel"}),
    "8 bits an output, whole": ("naive_quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8 an output": ("naive_quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8, one scale": ("naive_quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8, in blocks": (
        "naive_quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
}
SCALES = {"group": (48, 4), "channel": (48, 1), "tensor": (1,), "block": (2, 4)}


@pytest.mark.parametrize("name", SCHEMES)
def test_what_compressed_tensors_packs_is_unpacked_as_it_does_itself(name: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    module, arguments = SCHEMES[name]
    library = PackedQuantizationCompressor if module == "pack_quantized" else NaiveQuantizationCompressor
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    generator = torch.Generator().manual_seed(0)
    layer = {"weight": torch.randn(48, 128, generator=generator)}
    layer["weight_scale"] = torch.rand(SCALES[arguments["strategy"]], generator=generator) * 0.1 + 0.1
    if not arguments.get("symmetric", True):
        layer["weight_zero_point"] = torch.randint(-8, 8, (48, 4), generator=generator).to(torch.int8)
    packed = library.compress(layer, scheme)
    found = compressed(packed, arguments.get("block_structure"))
    torch.testing.assert_close(found, library.decompress(packed, scheme)["weight"].float(), rtol=1e-6, atol=0)
