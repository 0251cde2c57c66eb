"""Checkpoints that show what rounding costs a model whose weights are rounded already.

smollm2-135m comes from a GGUF file of type Q4_1: rounding its weights to 4 bits in groups of 32 changes nothing. Off
that grid it says what 4 bits would cost weights that were never rounded:

    python benchmarks/off_grid.py ./moved
    paceline eval ./moved --set linear_backend=int4

Each weight is moved at random within half a step of its grid, so that any value that would have been rounded to it is
as likely. And on another grid, of 4 bits in groups of 128:

    python benchmarks/off_grid.py ./groups-of-128 --round-to 128
    paceline eval ./groups-of-128 --reference smollm2-135m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from paceline.models import load_causal_lm, load_tokenizer, resolve

LEVELS = 15
"""Steps between the least and the greatest of a group's 16 values."""


def moved(weight: torch.Tensor, generator: torch.Generator, group: int = 32) -> torch.Tensor:
    """`weight` [outputs, inputs], each value up to half a step of its group's grid away."""
    grouped = weight.unflatten(1, (-1, group))
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / LEVELS
    return (grouped + step * (torch.rand(grouped.shape, generator=generator) - 0.5)).flatten(1)


def rounded(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`weight` [outputs, inputs] to the nearest of 16 values between the least and the greatest of its group; the last
    group of a row may be shorter."""
    parts = []
    for part in weight.split(group, dim=1):
        least, step = part.amin(1, keepdim=True), (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / LEVELS
        parts.append(least + step * ((part - least) / step.clamp_min(1e-12)).round())
    return torch.cat(parts, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the new checkpoint")
    parser.add_argument("--model", default="smollm2-135m", help="the model to begin with")
    parser.add_argument("--round-to", metavar="GROUP", type=int, help="round to groups of this size instead of moving")
    options = parser.parse_args()
    path = resolve(options.model).path
    model = load_causal_lm(path, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
                group = options.round_to
                new = moved(module.weight, generator) if group is None else rounded(module.weight, group)
                module.weight.copy_(new)
    model.save_pretrained(options.out)
    load_tokenizer(path).save_pretrained(options.out)
    print(f"{options.out} is ready")


if __name__ == "__main__":
    main()
