"""The lean forward pass against transformers.generate, family by family; what it does not cover is refused."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from paceline.engine.attention import Window
from paceline.engine.lean import LeanRunner, NotLeanError, lean_runner, refuse_other_structures
from paceline.engine.native import Kernels, kernels
from paceline.engine.products import KEEPING, Int8, LinearBackends, Packer, Product, fp16_product, torch_product
from paceline.models.lazy import empty_causal_lm, with_weights_in_files
from paceline.speculation.local import LocalProposer
from tests import tiny
from tests.tiny import SHAPE

PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 2, 5, 17, 40, 100)]
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-wide-heads": LlamaConfig(**SHAPE | {"hidden_size": 128, "num_attention_heads": 2}, head_dim=64),
    "llama-scaled-rope": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=23, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
    "granite": GraniteConfig(
        **SHAPE, embedding_multiplier=2.0, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=1.5
    ),
}
OTHERS: dict[str, tuple[Any, str]] = {
    "gemma": (GemmaConfig(**SHAPE, head_dim=8), "."),
    "olmo2": (Olmo2Config(**SHAPE), "input_layernorm|post_feedforward_layernorm"),
}


def built(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.normal_(mean=float("norm" in name), std=0.3)
    return model


def compiled() -> Kernels:
    found = kernels()
    assert isinstance(found, Kernels), found
    return found


def lean(model: PreTrainedModel) -> LeanRunner:
    return lean_runner(model, compiled(), torch_product)


def requests(**params: object) -> list[tiny.Request]:
    return [tiny.request(tokens, str(n), **params) for n, tokens in enumerate(PROMPTS)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [11, 512])
def test_greedy_equals_transformers(family: str, budget: int) -> None:
    model = built(FAMILIES[family])
    engine = tiny.engine_for(model, runner=lean(model), max_batched_tokens=budget)
    found = tiny.run(engine, *requests())
    assert [found[str(n)] for n in range(len(PROMPTS))] == [tiny.generate(model, tokens) for tokens in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_speculation_changes_no_sampled_token(family: str) -> None:
    model = built(FAMILIES[family])
    seeded = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
    plain = tiny.run(tiny.engine_for(model, runner=lean(model)), *requests(**seeded))
    proposer = LocalProposer(tiny.drafter_for(tiny.tiny_llama(seed=7)))
    assert (
        tiny.run(tiny.engine_for(model, runner=lean(model), proposer=proposer, depth=6), *requests(**seeded)) == plain
    )


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_built_differently_is_refused_with_the_reason(family: str) -> None:
    config, reason = OTHERS[family]
    with pytest.raises(NotLeanError, match=reason):
        lean(built(config))


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_built_differently_is_refused_without_its_weights(family: str) -> None:
    config, reason = OTHERS[family]
    with pytest.raises(NotLeanError, match=reason):
        refuse_other_structures(empty_causal_lm(config, dtype=torch.float32))


def test_other_logits_are_refused() -> None:
    model = built(FAMILIES["llama"])
    # Same modules, other arithmetic: what a structural check alone would miss.
    model.model.layers[1].mlp.act_fn.forward = torch.tanh
    with pytest.raises(NotLeanError, match="logits differ"):
        lean(model)


def coarse(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Three bits or so."""
    step = weight.abs().amax(dim=1, keepdim=True) / 6
    return torch_product((weight / step).round() * step, bias)


def test_rounded_weights_are_told_from_another_structure() -> None:
    model = built(FAMILIES["llama"])
    with pytest.raises(NotLeanError, match="logits differ"):
        lean_runner(model, compiled(), coarse)
    assert isinstance(lean_runner(model, compiled(), coarse, rounds=True), LeanRunner)


def test_another_structure_is_refused_with_rounded_weights_too() -> None:
    model = built(FAMILIES["llama"])
    model.model.layers[1].mlp.act_fn.forward = torch.tanh
    with pytest.raises(NotLeanError, match="its logits differ"):
        lean_runner(model, compiled(), coarse, rounds=True)


def test_weights_rounded_to_nothing_are_refused() -> None:
    model = built(FAMILIES["llama"])
    with pytest.raises(NotLeanError, match="with its weights rounded"):
        lean_runner(model, compiled(), lambda weight, bias: torch_product(weight * 0, bias), rounds=True)


def test_half_precision_weights_that_are_exact_change_no_token() -> None:
    model = built(FAMILIES["llama"])
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    found = tiny.run(tiny.engine_for(model, runner=lean_runner(model, compiled(), fp16_product)), *requests())
    assert [found[str(n)] for n in range(len(PROMPTS))] == [tiny.generate(model, tokens) for tokens in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_layers_in_one_call_give_the_bits_of_layer_by_layer(family: str, rows: int) -> None:
    config = FAMILIES[family]
    wide = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "head_dim": 16}
    model = built(type(config)(**config.to_dict() | wide))
    runner = lean_runner(model, compiled(), Packer(LinearBackends(KEEPING, Int8())), rounds=True)
    ids, found = list(tiny.prompt(60)), []
    for stack in (runner._stack, None):
        assert stack is not None or found
        runner._stack = stack
        kv = tiny.kv_for(runner, 64)
        entry = kv.reserve(ids, 60)
        assert entry is not None
        first = runner.run([Window(entry, ids[:20], sample=1)])
        kv.append(entry, ids[:20])
        found.append(torch.cat([first, runner.run([Window(entry, ids[20 : 20 + rows], sample=rows)])]))
    assert torch.equal(*found)


def test_the_lean_pass_keeps_nothing_of_the_model() -> None:
    model: PreTrainedModel | None = built(FAMILIES["llama"])
    assert model is not None
    layer = weakref.ref(model.model.layers[0])
    kept = lean(model)
    del model
    gc.collect()
    assert (layer(), kept.vocab_size) == (None, tiny.VOCAB)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_embedding_keeps_the_narrowest_type_that_is_exact(dtype: torch.dtype) -> None:
    model = built(FAMILIES["llama"])
    weight = model.model.embed_tokens.weight
    weight[5, 5] = {torch.float16: 1.0, torch.bfloat16: 1e30, torch.float32: 1.0 + 2.0**-20}[dtype]
    if dtype is not torch.float32:
        weight.copy_(weight.to(dtype).float())
    assert lean(model)._embedding.dtype == dtype


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = built(FAMILIES[request.param])
    model.save_pretrained(tmp_path)
    return model, tmp_path


def in_files(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    found = with_weights_in_files(empty_causal_lm(model.config, dtype=torch.float32), path)
    assert not isinstance(found, str), found
    return found


def test_weights_in_files_give_the_same_tokens(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    found = tiny.run(tiny.engine_for(model, runner=lean(in_files(model, path))), *requests())
    assert [found[str(n)] for n in range(len(PROMPTS))] == [tiny.generate(model, tokens) for tokens in PROMPTS]


def test_no_other_weight_is_in_memory_while_one_is_packed(saved: tuple[PreTrainedModel, Path]) -> None:
    model = in_files(*saved)
    devices: set[str] = set()

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        devices.update(parameter.device.type for parameter in model.parameters())
        return torch_product(weight, bias)

    lean_runner(model, compiled(), pack)
    assert devices == {"meta"}
