"""Checkpoints that show what rounding costs a model whose weights are rounded already.

smollm2-135m comes from a GGUF file of type Q4_1: rounding its layers to 4 bits in groups of 32 changes nothing. With
its channels shuffled it is the same function, and no group of its weights lies on a grid any more:

    python benchmarks/off_grid.py shuffle ./shuffled
    paceline eval ./shuffled --set weight_dtype=int4

Or the layers are rounded here, in groups of any size, and the output head is left alone:

    python benchmarks/off_grid.py round ./rounded --model ./shuffled --group 32
    paceline eval ./rounded --reference ./shuffled
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from paceline.models import load_causal_lm, load_tokenizer, resolve

LEVELS = 15
"""Steps between the least and the greatest of a group's 16 values."""


def shuffle(model: Any, generator: torch.Generator) -> None:
    """Put a Llama's channels into another order, everywhere alike: the residual stream's, those between up and down,
    and those of each value head."""
    config = model.config
    stream = torch.randperm(config.hidden_size, generator=generator)
    embedding = model.model.embed_tokens.weight
    for parameter in {id(each): each for each in (embedding, model.lm_head.weight)}.values():
        parameter.copy_(parameter[:, stream])
    model.model.norm.weight.copy_(model.model.norm.weight[stream])
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[stream])
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[:, stream])
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(linear.weight[stream])
        between = torch.randperm(config.intermediate_size, generator=generator)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[between])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, between])
        _shuffle_values(attention, config, generator)


def _shuffle_values(attention: Any, config: Any, generator: torch.Generator) -> None:
    heads, copies = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    values = attention.v_proj.weight.view(heads, attention.head_dim, -1)
    outputs = attention.o_proj.weight.view(-1, heads, copies, attention.head_dim)
    for head in range(heads):
        order = torch.randperm(attention.head_dim, generator=generator)
        values[head] = values[head, order].clone()
        outputs[:, head] = outputs[:, head][..., order].clone()


def round_layers(model: Any, group: int) -> None:
    """Every linear layer but the output head to the nearest of 16 values between the least and the greatest of each
    group; the last group of a row may be shorter."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                parts = [rounded(part) for part in module.weight.split(group, dim=1)]
                module.weight.copy_(torch.cat(parts, dim=1))


def rounded(group: torch.Tensor) -> torch.Tensor:
    """One group of each row."""
    least = group.amin(1, keepdim=True)
    step = ((group.amax(1, keepdim=True) - least) / LEVELS).clamp_min(1e-12)
    return least + step * ((group - least) / step).round()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("shuffle", "round"))
    parser.add_argument("out", type=Path, help="folder of the new checkpoint")
    parser.add_argument("--model", default="smollm2-135m", help="the model to begin with, built like Llama")
    parser.add_argument("--group", type=int, default=32, help="weights of a row that are rounded together")
    options = parser.parse_args()
    path = resolve(options.model).path
    model = load_causal_lm(path, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if options.action == "shuffle":
            shuffle(model, torch.Generator().manual_seed(0))
        else:
            round_layers(model, options.group)
    model.save_pretrained(options.out)
    load_tokenizer(path).save_pretrained(options.out)
    print(f"{options.out} is ready")


if __name__ == "__main__":
    main()
