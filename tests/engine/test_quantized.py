"""Quantized models through the engine: checkpoints that are, libraries that do it, and what runs where."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.backends import resolve_backends
from paceline.engine.lean import LeanRunner
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.runner import ModelRunner
from paceline.errors import ConfigError
from paceline.models import load_causal_lm, quantization
from paceline.models.quantization import LibraryQuantization, library_quantization
from tests import tiny
from tests.models import packings

PROMPT = tiny.prompt(40)
CPU = torch.device("cpu")
ON_A_CPU = ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao_int8")
ALL = (*ON_A_CPU, "torchao_int4", "torchao_fp8")


def loaded(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, EngineSettings(**{"device": "cpu", "threads": 1, "kv_tokens": 512} | options))


def chosen(model: LoadedModel) -> dict[str, str]:
    return {choice.name: choice.value for choice in model.choices}


def tokens(model: LoadedModel) -> list[int]:
    return tiny.run(model.engine(), tiny.request(PROMPT, ignore_eos=True))["r"]


def logits(model: LoadedModel) -> torch.Tensor:
    engine = model.engine()
    entry = engine.kv.reserve(PROMPT, len(PROMPT))
    assert entry is not None
    return model.runner.run([Window(entry, PROMPT, sample=len(PROMPT))])


def reference_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


# ---- checkpoints

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
CHECKPOINTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "gptq": (GPTQ, packings.gptq, {}),
    "gptq, symmetric, groups of 64": (GPTQ | {"group_size": 64}, packings.gptq, {"group": 64, "symmetric": True}),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, packings.gptq, {"bits": 8, "symmetric": True}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, packings.awq, {"group": 64}),
    "pack-quantized": (
        packings.compressed_settings("pack-quantized", strategy="group", group_size=32, symmetric=False),
        packings.packed,
        {},
    ),
}


def written(path: Path, name: str) -> PreTrainedModel:
    settings, pack, kind = CHECKPOINTS[name]
    tiny.save_tokenizer(path)
    return packings.write(path, settings, pack, **kind)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_quantized_checkpoint_runs_over_its_own_integers(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    model = loaded(tmp_path)
    assert isinstance(model.runner, LeanRunner)
    assert f"int{8 if '8 bits' in name else 4} x12" in chosen(model)["linear layers"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_logits_are_those_of_the_weights_they_mean(tmp_path: Path, name: str) -> None:
    reference = written(tmp_path, name)
    expected = reference_logits(reference)
    away = (logits(loaded(tmp_path, compute_dtype="fp32")) - expected).abs().max()
    assert float(away) < 1e-4 * float(expected.std())


def test_without_float32_they_are_unpacked_to_what_runs(tmp_path: Path) -> None:
    reference = written(tmp_path, "awq").bfloat16()
    model = loaded(tmp_path, dtype="bfloat16")
    assert isinstance(model.runner, ModelRunner)
    expected = reference_logits(reference).float()
    assert float((logits(model) - expected).square().mean().sqrt()) < 0.1 * float(expected.std())


# ---- libraries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.tiny_llama(**packings.SHAPE).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    return tmp_path


def need(name: str) -> None:
    library = name.partition("_")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_library_s_weights_are_served_in_one_batch(folder: Path, name: Any, dtype: str) -> None:
    need(name)
    model = loaded(folder, quantization=name, dtype=dtype)
    assert isinstance(model.runner, ModelRunner)
    assert chosen(model)["linear layers"].startswith(name.replace("_", " "))


def test_bitsandbytes_does_not_fill_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    need("bitsandbytes_8bit")
    tokens(loaded(folder, quantization="bitsandbytes_8bit"))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize("options", [{"quantization": "torchao_int8"}, {"quantization": "bitsandbytes_4bit"}])
def test_its_tokens_are_those_transformers_generates(folder: Path, options: dict[str, Any]) -> None:
    need(options["quantization"])
    library = library_quantization(EngineSettings(**options), CPU)
    reference = load_causal_lm(folder, dtype=torch.float32, device="cpu", quantization=library)
    assert tokens(loaded(folder, **options)) == tiny.generate(reference, PROMPT)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_rounded_logits_resemble_the_model_s(folder: Path, name: Any) -> None:
    need(name)
    expected = reference_logits(load_causal_lm(folder, dtype=torch.float32, device="cpu"))
    away = (logits(loaded(folder, quantization=name)) - expected).square().mean().sqrt() / expected.std()
    assert 1e-3 < float(away) < (0.6 if "4bit" in name else 0.1)


def test_4_bits_are_those_of_the_settings() -> None:
    need("bitsandbytes_4bit")
    settings = EngineSettings(
        quantization="bitsandbytes_4bit", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    )
    library = library_quantization(settings, CPU)
    assert library is not None
    config = library.config(torch.float16)
    found = (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, config.bnb_4bit_compute_dtype)
    assert (library.name, *found) == ("bitsandbytes 4bit (fp4, double quantization)", "fp4", True, torch.float16)


@pytest.mark.parametrize("name", ALL)
def test_a_library_that_is_not_installed_is_refused_with_the_remedy(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install paceline\[(gpu|quantization)\]") as refused:
        library_quantization(EngineSettings(quantization=name), CPU)
    assert refused.value.param == "engine.quantization"


@pytest.mark.parametrize("name", ["torchao_int4", "torchao_fp8"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"needs a GPU; on a CPU use engine\.weight_dtype"):
        library_quantization(EngineSettings(quantization=name), CPU)


@pytest.mark.parametrize("name", ["torchao_int4", "torchao_fp8"])
def test_products_of_bfloat16_alone_are_refused_for_other_activations(name: Any) -> None:
    need(name)
    with pytest.raises(ConfigError, match=r"multiplies bfloat16, not float16; set engine\.dtype"):
        LibraryQuantization(EngineSettings(quantization=name)).config(torch.float16)


@pytest.mark.parametrize("name", ["torchao_int4", "torchao_fp8"])
def test_a_gpu_s_configuration_is_one_transformers_takes(name: Any) -> None:
    need(name)
    config = LibraryQuantization(EngineSettings(quantization=name, group_size=128)).config(torch.bfloat16)
    assert config.quant_type.set_inductor_config is False


@pytest.mark.parametrize(
    "setting", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": True}, {"offload_folder": "weights"}]
)
def test_a_setting_that_says_nothing_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="set that, too") as refused:
        resolve_backends(EngineSettings(device="cpu", **setting))
    assert refused.value.param == f"engine.{next(iter(setting))}"


# ---- what keys and values depend on


@pytest.mark.parametrize(
    "options",
    [
        {"weight_dtype": "int8"},
        {"weight_dtype": "int4"},
        {"weight_dtype": "int4", "group_size": 128},
        {"compute_dtype": "int8"},
        {"linear_backend": "fbgemm_fp16"},
        {"quantization": "torchao_int8"},
        {"quantization": "bitsandbytes_4bit"},
        {"quantization": "bitsandbytes_4bit", "bnb_4bit_quant_type": "fp4"},
    ],
)
@pytest.mark.slow
def test_kv_of_other_rounding_has_another_identity(folder: Path, options: dict[str, Any]) -> None:
    need(options.get("quantization", "torch_"))
    assert loaded(folder, **options).kv_identity != loaded(folder).kv_identity


def test_groups_of_128_are_another_rounding(folder: Path) -> None:
    by_32, by_128 = (loaded(folder, weight_dtype="int4", group_size=size).kv_identity for size in (32, 128))
    assert by_32 != by_128


@pytest.mark.parametrize(("weight_dtype", "runs"), [("int8", "int8"), ("int4", "int4 x12, int8 x1")])
def test_rounding_on_a_cpu_is_what_runs(folder: Path, weight_dtype: Any, runs: str) -> None:
    assert chosen(loaded(folder, weight_dtype=weight_dtype))["linear layers"] == runs


def test_a_head_of_8_bits_is_the_model_s_own_code_s_too(folder: Path) -> None:
    model = loaded(folder, weight_dtype="int4", attn_implementation="sdpa")
    assert isinstance(model.runner, ModelRunner)
    assert chosen(model)["linear layers"] == "int4 x21, int8 x1"
