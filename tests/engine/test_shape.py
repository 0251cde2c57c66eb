"""Shapes read from configurations, against real models of every family."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from paceline.engine.attention import ATTENTION_NAME
from paceline.engine.families import runner_for
from paceline.engine.geometry import Observer
from paceline.engine.shape import model_shape
from paceline.errors import ModelError
from paceline.models.estimate import ModelShape, Step, activation_bytes, weight_bytes
from paceline.models.precisions import precision_named
from tests import tiny
from tests.engine.families import FAMILIES, model_of, path_of, runner_of

NAMES = [family.name for family in FAMILIES]
HALF_DTYPE = torch.bfloat16


def config_of(name: str, **changed: Any) -> PretrainedConfig:
    family = next(family for family in FAMILIES if family.name == name)
    return CONFIG_MAPPING[family.model_type](**{"tie_word_embeddings": False, **family.config, **changed})


def held(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; what is tied counts once."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_weights_in_16_bits_take_what_the_real_model_takes(name: str, tied: bool) -> None:
    config = config_of(name, tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(config, dtype=HALF_DTYPE)
    assert weight_bytes(model_shape(config), precision_named("bf16", "cuda")) == held(real)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-2", "GPTBigCode", "Mixtral", "Falcon 7B", "MPT", "OPT"])
def test_weights_in_32_bits_take_what_the_real_model_takes(name: str) -> None:
    config = config_of(name)
    real = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert weight_bytes(model_shape(config), precision_named("fp32", "cuda")) == held(real)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_those_the_engine_keeps(name: str) -> None:
    found, geometry = model_shape(config_of(name)).kv, runner_of(name).kv_geometry()
    expected = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    assert (found.layers, found.kv_heads, found.head_dim) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_as_long_as_in_the_engine(name: str) -> None:
    assert model_shape(config_of(name)).max_model_len == runner_of(name).max_model_len


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral", "GPT-2", "StableLM"])
def test_lean_is_what_runs_lean(name: str) -> None:
    assert model_shape(config_of(name)).lean == (path_of(name) == "ragged; lean on CPUs")


@pytest.mark.parametrize(("name", "sharing"), [("Llama", "GQA"), ("GPTBigCode", "MQA"), ("GPT-2", "MHA")])
def test_sharing_is_seen(name: str, sharing: str) -> None:
    assert model_shape(config_of(name)).kv.sharing == sharing


def test_a_sliding_window_is_seen_layer_by_layer() -> None:
    kv = model_shape(config_of("Gemma 2")).kv
    assert (kv.sliding_layers, kv.window) == (2, 11)


def test_scores_that_are_capped_are_kept() -> None:
    assert model_shape(config_of("Gemma 2")).scores_kept


def test_experts_are_counted_apart() -> None:
    real = sum(weight.numel() for weight in model_of("Mixtral").parameters() if weight.dim() == 3)
    assert model_shape(config_of("Mixtral")).experts == real


def test_a_transposed_linear_layer_has_its_outputs_and_inputs() -> None:
    """GPT-2 stores [inputs, outputs]."""
    first = model_shape(config_of("GPT-2")).matrices[0]
    assert (first.outputs, first.inputs, first.packs) == (3 * 48, 48, False)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "deepseek_v3 cannot be served: its layers keep keys and values of different shapes"),
        ("mamba", "recurrent state"),
        ("t5", "encoder-decoder"),
        ("openai-gpt", "0 of its 12 layers keep keys and values"),
    ],
)
def test_what_the_engine_refuses_is_refused(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        model_shape(CONFIG_MAPPING[model_type]())


def saved(folder: Path, dtype: torch.dtype) -> ModelShape:
    """A tiny Llama of random numbers, saved; its inputs make whole groups."""
    model = tiny.tiny_llama(hidden_size=96).to(dtype)
    model.save_pretrained(folder)
    return model_shape(model.config, folder)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_an_embedding_in_files_is_as_wide_as_its_numbers(tmp_path: Path, dtype: torch.dtype, itemsize: int) -> None:
    assert saved(tmp_path, dtype).itemsize == itemsize


def test_a_quantized_checkpoint_is_seen() -> None:
    config = config_of("Llama", quantization_config={"quant_method": "gptq", "bits": 4})
    assert model_shape(config).quantized == "gptq"


def test_a_folder_without_weights_counts_as_none(tmp_path: Path) -> None:
    config = config_of("Llama", dtype="bfloat16")
    assert model_shape(config, tmp_path).itemsize == 2


class Live(TorchDispatchMode):
    """Counts the bytes of what a forward pass makes and still holds; on the meta device as on any other."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


REAL_SHAPES = [
    GPTBigCodeConfig(n_embd=6144, n_layer=2, n_head=48, n_inner=24576, vocab_size=49152, n_positions=512),
    LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_key_value_heads=8),
    Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    GPTNeoXConfig(num_hidden_layers=2),
    MixtralConfig(num_hidden_layers=2),
]


@pytest.mark.parametrize("config", REAL_SHAPES, ids=lambda config: config.model_type)
def test_activations_cover_what_the_models_code_makes_and_no_twice_as_much(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=HALF_DTYPE, attn_implementation=ATTENTION_NAME).eval()
        ids, rows = torch.zeros((1, 512), dtype=torch.long), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode(), Live([*model.parameters(), *model.buffers(), ids, rows]) as live:
        model(input_ids=ids, position_ids=ids, use_cache=False, paceline_step=Observer(), logits_to_keep=rows)
    expected = activation_bytes(model_shape(config), precision_named("bf16", "cuda"), Step(512, 1, 512))
    assert live.most <= expected < 2 * live.most


def test_the_model_itself_is_still_one_the_engine_takes() -> None:
    """A shape is read from a copy: what belongs to the caller stays as it was."""
    config = config_of("GPT-2")
    model_shape(config)
    assert runner_for(AutoModelForCausalLM.from_config(config).eval()).max_model_len == config.n_positions
