"""The whole of `paceline distill` on a tiny random target, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from paceline import LLM, SamplingParams
from paceline.config import EngineSettings
from paceline.distill.run import Outcome, Settings, distill
from paceline.distill.shape import DraftShape
from paceline.distill.train import TrainSettings
from paceline.engine.load import load_model
from paceline.errors import ConfigError, ModelError
from paceline.models import load_tokenizer, resolve, tokenizer_fingerprint
from paceline.models.draft_folder import dequantize, load_draft, load_tokens, quantize, read_card
from tests.tiny import tiny_llama

VOCAB = 259
PROMPTS = ("say a word", "hello there", "count to three", "what is it", "name a bird", "go on", "why", "sing")
SETTINGS = Settings(
    target="tiny",
    minutes=1.0,
    device="cpu",
    sizes=(DraftShape(kept=240, hidden=64, layers=1, mlp=64, kv_heads=1),),
    recipes=(TrainSettings(batch=8, lr=1e-2),),
    prompts=PROMPTS,
    held_out={"chat": ("tell me", "how come", "who are you"), "lists": ("two fish", "a list", "ten words")},
    row_length=64,
    streams=16,
    write_rounds=2,
    train_steps=60,
    max_tokens=16,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, three special tokens, a chat template of one line."""
    special = ["<pad>", "<s>", "</s>"]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return fast


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer: mostly the last token decides, so there is something to learn in seconds."""
    path = tmp_path_factory.mktemp("target")
    tiny_llama(vocab_size=VOCAB, num_hidden_layers=1).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return distill(target, tmp_path_factory.mktemp("out") / "draft", SETTINGS)


def test_training_improves_acceptance(made: Outcome) -> None:
    """With noise: a random target's best tokens are too near to each other to be learned in seconds."""
    assert made.acceptance[0.8]["all"].tokens_per_step[4] > 1.2 * made.before[0.8].tokens_per_step[4]


def test_nothing_but_the_draft_is_left(made: Outcome) -> None:
    names = {path.name for path in made.path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "paceline_draft.json", "tokenizer.json.xz"}


def test_the_card_has_the_tokenizers_fingerprint(made: Outcome, target: Path) -> None:
    assert read_card(made.path).fingerprint == tokenizer_fingerprint(load_tokenizer(target))


def test_a_draft_folder_resolves_without_a_tokenizer(made: Outcome) -> None:
    assert resolve(str(made.path)).path == made.path.resolve()


def test_a_loaded_draft_has_its_targets_vocabulary(made: Outcome) -> None:
    loaded = load_model(made.path, EngineSettings(device="cpu", threads=1, kv_tokens=256))
    assert loaded.runner.vocab_size == VOCAB


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_output_is_the_targets_own(made: Outcome, target: Path, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=12)
    plain = LLM(str(target), device="cpu", kv_tokens=512, threads=1).generate("hello", params)
    drafted = LLM(str(target), str(made.path), device="cpu", kv_tokens=512, threads=1).generate("hello", params)
    assert drafted[0].outputs[0].token_ids == plain[0].outputs[0].token_ids


def test_the_engine_accepts_what_was_measured(made: Outcome, target: Path) -> None:
    """Greedy candidates of the served draft stand about as often as the figures say."""
    llm = LLM(str(target), str(made.path), device="cpu", kv_tokens=512, threads=1)
    outputs = llm.generate(list(PROMPTS), SamplingParams(temperature=0.0, max_tokens=16))
    assert sum(one.outputs[0].metrics.drafted for one in outputs) > 0


def test_a_card_of_another_format_is_refused(made: Outcome, tmp_path: Path) -> None:
    text = (made.path / "paceline_draft.json").read_text()
    (tmp_path / "paceline_draft.json").write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ModelError, match="format 9"):
        read_card(tmp_path)


def test_weights_read_back_on_the_grid(made: Outcome) -> None:
    weight = load_draft(made.path, dtype=torch.float32, device="cpu").model.layers[0].mlp.up_proj.weight
    error = (dequantize(*quantize(weight)) - weight).abs().max() / weight.abs().max()
    assert float(error) < 1e-3


def test_kept_tokens_are_ascending(made: Outcome) -> None:
    kept, _ = load_tokens(made.path)
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_an_interrupted_run_goes_on(target: Path, tmp_path: Path) -> None:
    brief = replace(SETTINGS, streams=4, write_rounds=1, train_steps=4, held_out={"chat": ["tell me"]}, max_tokens=4)
    phases: list[str] = []

    def stop(phase: str, fraction: float, remark: str) -> None:
        if phase == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(target, tmp_path / "draft", brief, stop)
    again = distill(target, tmp_path / "draft", brief, lambda phase, *_: phases.append(phase))
    assert ("writing text" in phases, again.progress.steps) == (False, 4)


def test_a_folder_with_something_else_is_refused(target: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        distill(target, tmp_path, SETTINGS)


def test_another_seed_does_not_go_on(target: Path, tmp_path: Path) -> None:
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "settings.json").write_text("{}")
    with pytest.raises(ConfigError, match="other settings"):
        distill(target, tmp_path, replace(SETTINGS, seed=1))
