from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from paceline.errors import ModelError
from paceline.models import (
    ModelFiles,
    eos_token_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
    tokenizer_fingerprint,
)


@pytest.fixture
def copy(tiny: ModelFiles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def model(tiny: ModelFiles) -> PreTrainedModel:
    return load_causal_lm(tiny.path, dtype=torch.float32, device="cpu", attn_implementation="eager")


@pytest.fixture
def tokenizer(tiny: ModelFiles) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny.path)


def test_model_is_in_eval_mode(model: PreTrainedModel) -> None:
    assert not model.training


def test_no_weight_wants_a_gradient(model: PreTrainedModel) -> None:
    assert not any(weight.requires_grad for weight in model.parameters())


def test_model_has_the_type_asked_for(model: PreTrainedModel) -> None:
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_auto_is_the_checkpoints_type(tiny: ModelFiles) -> None:
    assert load_causal_lm(tiny.path, dtype="auto", device="cpu").dtype == torch.float16


def test_attention_is_the_one_asked_for(model: PreTrainedModel) -> None:
    assert model.config._attn_implementation == "eager"


def test_missing_weight_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights missing \(model\.norm\.weight\)"):
        load_causal_lm(copy, dtype=torch.float32, device="cpu")


def test_damaged_weights_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        load_causal_lm(copy, dtype=torch.float32, device="cpu")
    assert "\n" not in caught.value.message


def test_pickled_weights_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_causal_lm(copy, dtype=torch.float32, device="cpu")


def test_code_in_the_folder_is_never_run(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (copy / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="never run"):
        load_config(copy)


def test_missing_folder_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer("owner/name")


def test_fingerprint_ignores_the_chat_template(tiny: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    other = load_tokenizer(tiny.path)
    other.chat_template = "something else"
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


def test_fingerprint_sees_an_added_token(tiny: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    other = load_tokenizer(tiny.path)
    other.add_tokens(["<tool>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_fingerprint_sees_two_tokens_swapped(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(load_tokenizer(copy)) != tokenizer_fingerprint(tokenizer)


def test_fingerprint_is_a_sha256(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(bytes.fromhex(tokenizer_fingerprint(tokenizer))) == 32


def test_eos_ids_of_all_sources_are_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    found = eos_token_ids(LlamaConfig(eos_token_id=7), GenerationConfig(eos_token_id=[8, 9]), tokenizer)
    assert found == {7, 8, 9, tokenizer.eos_token_id}


def test_model_without_an_end_has_no_eos_ids() -> None:
    assert eos_token_ids(LlamaConfig(eos_token_id=None)) == frozenset()


def test_smollm2_chat_template_opens_the_answer(smollm2: ModelFiles) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = load_tokenizer(smollm2.path).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_ends_its_turn_with_im_end(smollm2: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2.path)
    ends = eos_token_ids(smollm2.path, None, tokenizer)
    assert tokenizer.convert_ids_to_tokens(sorted(ends)) == ["<|im_end|>"]


def test_smollm2_embedding_is_tied(smollm2: ModelFiles) -> None:
    model = load_causal_lm(smollm2.path, dtype="auto", device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
