"""A tiny model on disk, with a tokenizer of one token a word."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests import tiny


def word_tokenizer(*, bos: bool = False, shift: int = 0) -> PreTrainedTokenizerFast:
    """`w7` is 7, or `shift` more; 0, 1 and 2 are special. With `bos` a text begins with 1."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n + shift}": n for n in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_model(folder: Path, seed: int = 0, shift: int = 0) -> Path:
    tiny.tiny_llama(seed).save_pretrained(folder)
    word_tokenizer(shift=shift).save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, tiny.VOCAB)}" for _ in range(count))
