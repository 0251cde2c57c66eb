"""The lean forward pass against transformers.generate, family by family; what it does not cover is refused."""

from __future__ import annotations

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

from paceline.engine.lean import LeanRunner, NotLeanError, lean_runner
from paceline.engine.native import Kernels, kernels
from paceline.engine.runner import ModelRunner
from paceline.speculation.local import LocalProposer
from tests import tiny

PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 2, 5, 17, 40, 100)]
SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
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
    return lean_runner(tiny.ours(model), compiled(), fp16=False)


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


def test_other_logits_are_refused() -> None:
    model = built(FAMILIES["llama"])
    runner = tiny.ours(model)
    # Same modules, other arithmetic: what a structural check alone would miss.
    runner.model.model.layers[1].mlp.act_fn.forward = torch.tanh
    with pytest.raises(NotLeanError, match="logits differ"):
        lean_runner(runner, compiled(), fp16=False)


def test_half_precision_weights_that_are_exact_change_no_token() -> None:
    model = built(FAMILIES["llama"])
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    runner = lean_runner(tiny.ours(model), compiled(), fp16=True)
    found = tiny.run(tiny.engine_for(model, runner=runner), *requests())
    assert [found[str(n)] for n in range(len(PROMPTS))] == [tiny.generate(model, tokens) for tokens in PROMPTS]


def test_the_lean_pass_keeps_nothing_of_the_model() -> None:
    import gc
    import weakref

    runner: ModelRunner | None = tiny.ours(built(FAMILIES["llama"]))
    assert runner is not None
    layer = weakref.ref(runner.model.model.layers[0])
    kept = lean_runner(runner, compiled(), fp16=True)
    del runner
    gc.collect()
    assert (layer(), kept.vocab_size) == (None, tiny.VOCAB)


def test_a_model_that_gives_up_its_weights_leaves_the_same_lean_one() -> None:
    model = tiny.tiny_llama()
    whole = tiny.ours(model)
    runner = lean_runner(whole, compiled(), fp16=False, consume=True)
    assert tiny.run(tiny.engine_for(model, runner=runner), tiny.request(tiny.prompt(9)))["r"] == tiny.generate(
        model, tiny.prompt(9)
    )
    assert whole.model.lm_head.weight.numel() == 0


def test_a_model_that_is_not_lean_gives_up_nothing() -> None:
    whole = tiny.ours(tiny.tiny_llama())
    whole.model.lm_head = torch.nn.Identity()
    with pytest.raises(NotLeanError) as caught:
        LeanRunner(whole, compiled(), fp16=False, consume=True)
    weights = [layer.self_attn.q_proj.weight.numel() for layer in whole.model.model.layers]
    assert (caught.value.spent, weights) == (False, [48 * 48] * 3)
