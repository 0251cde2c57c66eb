"""Child process: one GGUF file in, one Transformers folder out.

    python -P convert_worker.py FILE.gguf FOLDER

A process of its own, for three reasons: the float32 copy's memory goes back to the system when it ends,
what Transformers prints stays in its pipes, and a crash in native code is an exit status. It imports
nothing of Paceline, so it runs wherever the parent's interpreter does. A failure is one line on stdout.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""GGUF's ends of a text, of a turn and of a message: each ends an answer."""


def main(arguments: list[str]) -> int:
    gguf, folder = Path(arguments[0]).resolve(), Path(arguments[1])
    # Set before Transformers is imported; nothing here may reach for a network or a terminal.
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    try:
        read_once()
        convert(gguf, folder)
        check(folder)
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__)
        return 1
    return 0


def read_once() -> None:
    """Remember what Transformers asks the gguf package for again and again; halves the time.

    It parses the file's 100 000 vocabulary entries four times and builds one table for each module. Both are
    read only, and this process ends after one file.
    """
    import gguf

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize to float32, save weights, config, tokenizer and chat template.

    The numbers stay what the file means: a product of 4-bit steps and their scale does not fit half precision, and
    rounded it is no longer the grid of 16 levels that the engine's int4 products keep.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as alone:
        # Alone in a folder: a tokenizer_config.json that happens to lie beside the file must not be mixed in.
        link = Path(alone) / "model.gguf"
        link.symlink_to(gguf)
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=link.name)
        model = AutoModelForCausalLM.from_pretrained(
            alone, gguf_file=link.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        ends = eos_ids(link) | ({tokenizer.eos_token_id} - {None})
    compute = half_if_it_fits(model)
    halve_what_is_exact(model)
    if ends:
        model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else ends.pop()
    model.save_pretrained(folder)
    name_dtype(folder / "config.json", compute)
    tokenizer.save_pretrained(folder)


def half_if_it_fits(model: PreTrainedModel) -> torch.dtype:
    """The type to compute in on a GPU: float16, or float32 for weights beyond its range."""
    import torch

    limit = torch.finfo(torch.float16).max
    fits = all(bool(weight.detach().abs().max() <= limit) for weight in model.parameters())
    return torch.float16 if fits else torch.float32


def halve_what_is_exact(model: PreTrainedModel) -> None:
    """Store a weight in half precision if that changes none of its numbers, as those of an F16 file."""
    for weight in model.parameters():
        if bool((weight.half() == weight).all()):
            weight.data = weight.data.half()


def name_dtype(config: Path, dtype: torch.dtype) -> None:
    """What Transformers takes for dtype="auto": it would name the type of the first weight it saved."""
    named = json.loads(config.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(named, indent=2) + "\n")


def eos_ids(gguf: Path) -> set[int]:
    """Every id the file names as an end."""
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields
    found = (fields.get(f"tokenizer.ggml.{key}") for key in EOS_KEYS)
    return {int(field.contents()) for field in found if field is not None}


def check(folder: Path) -> None:
    """Load the folder the way the engine will; a few logits must be finite."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    ids = torch.tensor([tokenizer("Hello")["input_ids"] or [0]])
    with torch.inference_mode():
        logits = model(ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the converted model computes infinite or undefined logits")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
