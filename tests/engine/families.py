"""Every family that is held token for token against transformers.generate, and the table of them in the README.

`python -m tests.engine.families --write` writes the table, `--check` says whether it is in step.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from paceline.engine.attention import Scoring
from paceline.engine.families import runner_for
from paceline.engine.geometry import Observer
from paceline.engine.lean import NotLeanError, lean_runner
from paceline.engine.native import Kernels, kernels
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.products import torch_product
from paceline.engine.runner import ModelRunner
from tests import tiny
from tests.tiny import SHAPE, SPECIAL

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
MULTI_HEAD = SHAPE | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}
GPT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "n_embd": 48,
    "n_inner": 80,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 512,
    "initializer_range": 0.2,
    **SPECIAL,
}
WINDOW = 11
"""Shorter than most prompts."""
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """A tiny model of a family, and what the README says of it beyond what trying it shows."""

    name: str
    model_type: str
    examples: str
    positions: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def built(self) -> PreTrainedModel:
        """Random weights, norms and biases included, large enough to have opinions."""
        config = CONFIG_MAPPING[self.model_type](**{"tie_word_embeddings": False, **self.config})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 2)[-2]
            if "norm" in last or "ln_" in last or "bias" in name or "sinks" in name:
                weight = name.endswith("weight") and "gemma" not in self.model_type
                parameter.normal_(mean=float(weight), std=0.3)
        return model


FAMILIES = [
    Family("Llama", "llama", "Llama 2 and 3, SmolLM2, TinyLlama, Vicuna", "RoPE", SHAPE),
    Family("Mistral", "mistral", "Mistral 7B, Zephyr", "RoPE", SHAPE | {"sliding_window": WINDOW, "head_dim": 10}),
    Family("Mixtral", "mixtral", "Mixtral 8x7B", "RoPE", SHAPE | {"num_local_experts": 4, "sliding_window": WINDOW}),
    Family("Qwen2", "qwen2", "Qwen2, Qwen2.5", "RoPE", SHAPE),
    Family(
        "Qwen2, sliding",
        "qwen2",
        "with `use_sliding_window`",
        "RoPE",
        SHAPE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    Family("Qwen3", "qwen3", "Qwen3 0.6B to 32B", "RoPE", SHAPE | {"head_dim": 12}),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3-30B-A3B",
        "RoPE",
        SHAPE | {"head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    Family("Gemma", "gemma", "Gemma 2B and 7B", "RoPE", SHAPE | {"head_dim": 10, "num_key_value_heads": 1}),
    Family(
        "Gemma 2",
        "gemma2",
        "Gemma 2 2B to 27B",
        "RoPE",
        SHAPE
        | {
            "head_dim": 10,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    Family(
        "Gemma 3 (text)",
        "gemma3_text",
        "Gemma 3 270M and 1B",
        "RoPE, local and global",
        SHAPE | {"head_dim": 10, "sliding_window": WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 7},
    ),
    Family(
        "Phi",
        "phi",
        "Phi-1.5, Phi-2",
        "partial RoPE",
        MULTI_HEAD | {"partial_rotary_factor": 0.5, "initializer_range": 0.4},
    ),
    Family(
        "Phi-3",
        "phi3",
        "Phi-3 and Phi-4 mini",
        "RoPE, partial RoPE",
        SHAPE | {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    ),
    Family(
        "OPT",
        "opt",
        "OPT 125M to 66B",
        "learned",
        {key: value for key, value in MULTI_HEAD.items() if key not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 80, "word_embed_proj_dim": 40, "init_std": 0.4},
    ),
    Family("GPT-2", "gpt2", "GPT-2, DistilGPT2, DialoGPT", "learned", GPT),
    Family("GPTBigCode", "gpt_bigcode", "StarCoder, SantaCoder, OctoCoder", "learned", GPT | {"multi_query": True}),
    Family(
        "GPT-NeoX",
        "gpt_neox",
        "Pythia, Dolly 2, GPT-NeoX-20B",
        "partial RoPE",
        MULTI_HEAD | {"rotary_pct": 0.5, "use_parallel_residual": True},
    ),
    Family("StarCoder2", "starcoder2", "StarCoder2 3B to 15B", "RoPE", SHAPE | {"sliding_window": WINDOW}),
    Family(
        "StableLM", "stablelm", "StableLM 2, StableLM Zephyr", "partial RoPE", SHAPE | {"partial_rotary_factor": 0.5}
    ),
    Family("OLMo2", "olmo2", "OLMo 2 1B to 32B", "RoPE", SHAPE),
    Family(
        "Granite",
        "granite",
        "Granite 3",
        "RoPE",
        SHAPE
        | {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 1.5},
    ),
    Family("SmolLM3", "smollm3", "SmolLM3 3B", "RoPE, some layers none", SHAPE | {"no_rope_layer_interval": 2}),
    Family("Cohere", "cohere", "Command R, Aya", "RoPE", SHAPE | {"use_qk_norm": True}),
    Family("GLM-4", "glm4", "GLM-4 0414", "partial RoPE", SHAPE | {"head_dim": 12, "partial_rotary_factor": 0.5}),
    Family("OLMo", "olmo", "OLMo 1B and 7B", "RoPE", SHAPE | {"clip_qkv": 1.5}),
    Family(
        "OLMo 3",
        "olmo3",
        "OLMo 3 7B and 32B",
        "RoPE",
        SHAPE | {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    Family("OLMoE", "olmoe", "OLMoE 1B-7B", "RoPE", SHAPE | {"num_experts": 5, "num_experts_per_tok": 2}),
    Family(
        "Cohere 2",
        "cohere2",
        "Command R7B, Command A",
        "RoPE, global layers none",
        SHAPE | {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    Family("Nemotron", "nemotron", "Nemotron 4, Minitron", "partial RoPE", SHAPE | {"partial_rotary_factor": 0.5}),
    Family(
        "gpt-oss",
        "gpt_oss",
        "gpt-oss 20B and 120B",
        "RoPE",
        SHAPE
        | {
            "head_dim": 10,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    Family(
        "Llama 4 (text)",
        "llama4_text",
        "the text part of Llama 4",
        "RoPE, some layers none",
        SHAPE
        | {
            "head_dim": 10,
            "num_local_experts": 3,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 80,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
    ),
    Family("GPT-J", "gptj", "GPT-J 6B", "partial RoPE", GPT | {"rotary_dim": 8}),
    Family(
        "GPT-Neo",
        "gpt_neo",
        "GPT-Neo, TinyStories",
        "learned",
        {
            "vocab_size": tiny.VOCAB,
            "hidden_size": 48,
            "num_layers": 3,
            "num_heads": 3,
            "intermediate_size": 80,
            "attention_types": [[["local", "global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            **SPECIAL,
        },
    ),
    Family("CodeGen", "codegen", "CodeGen", "partial RoPE", GPT | {"n_head": 4, "rotary_dim": 8}),
    Family("Falcon 7B", "falcon", "Falcon 7B", "RoPE", MULTI_HEAD | {"multi_query": True, "alibi": False}),
    Family(
        "Falcon, new decoder",
        "falcon",
        "Falcon 40B and 180B, Falcon2",
        "RoPE",
        SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    Family(
        "Falcon RW",
        "falcon",
        "Falcon-RW 1B and 7B",
        "ALiBi",
        MULTI_HEAD
        | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True, "initializer_range": 0.4},
    ),
    Family(
        "MPT",
        "mpt",
        "MPT 7B and 30B",
        "ALiBi",
        {
            "vocab_size": tiny.VOCAB,
            "d_model": 48,
            "n_heads": 3,
            "n_layers": 3,
            "max_seq_len": 512,
            "initializer_range": 0.2,
            **SPECIAL,
        },
    ),
    Family(
        "BLOOM",
        "bloom",
        "BLOOM, BLOOMZ",
        "ALiBi",
        {"vocab_size": tiny.VOCAB, "hidden_size": 40, "n_head": 5, "n_layer": 3, "initializer_range": 0.4, **SPECIAL},
    ),
]


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """With the attention that has all of the family's arithmetic: fused kernels leave soft-capping out in silence."""
    model = next(family for family in FAMILIES if family.name == name).built()
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model


@functools.cache
def runner_of(name: str) -> ModelRunner | PerSequenceRunner:
    """The runner chosen for the family; its weights are its own."""
    return runner_for(copy.deepcopy(model_of(name)))


def path_of(name: str) -> str:
    """How the family runs, found by trying."""
    runner, found = runner_of(name), kernels()
    if isinstance(runner, PerSequenceRunner):
        return "per sequence"
    assert isinstance(found, Kernels), found
    try:
        lean_runner(model_of(name), found, torch_product)
    except NotLeanError:
        return "ragged"
    return "ragged; lean on CPUs"


@dataclass(frozen=True)
class Noting(Observer):
    """Also notes how layers score."""

    scorings: list[Scoring] = field(default_factory=list)

    def attend(self, layer: int, query: Any, key: Any, value: Any, scoring: Scoring) -> Any:
        self.scorings.append(scoring)
        return super().attend(layer, query, key, value, scoring)


def features_of(name: str) -> list[str]:
    """What the family asks of attention, seen as it runs."""
    runner, config = runner_of(name), model_of(name).config
    kept, heads = runner.kv_geometry().num_kv_heads, config.num_attention_heads
    found = ["multi-query"] if kept == 1 < heads else ["grouped-query"] if kept < heads else []
    if isinstance(runner, ModelRunner):
        noting = Noting()
        zero = torch.zeros((1, 1), dtype=torch.long)
        runner.model(input_ids=zero, position_ids=zero, use_cache=False, paceline_step=noting)
        sliding = [scoring.sliding_window is not None for scoring in noting.scorings]
        if any(sliding):
            found.append("sliding window" if all(sliding) else "sliding window in some layers")
        found += ["soft-capping"] if any(scoring.softcap for scoring in noting.scorings) else []
        found += ["attention sinks"] if any(scoring.sinks is not None for scoring in noting.scorings) else []
    return found


def table() -> str:
    lines = ["| Family | For example | Runs | Positions | Attention |", "| --- | --- | --- | --- | --- |"]
    for family in FAMILIES:
        features = ", ".join(features_of(family.name)) or "multi-head"
        lines.append(
            f"| {family.name} | {family.examples} | {path_of(family.name)} | {family.positions} | {features} |"
        )
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README with the table in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"README.md lacks {BEGIN} or {END}"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(option: str) -> int:
    readme = README.read_text()
    made = with_table(readme)
    if option == "--write":
        README.write_text(made)
        return 0
    if made != readme:
        print("README.md: the table of families is out of step; run python -m tests.engine.families --write")
    return int(made != readme)


if __name__ == "__main__":
    # The module that the tests import holds the registry; this one is only its name on the command line.
    from tests.engine import families

    sys.exit(families.main(*sys.argv[1:]))
