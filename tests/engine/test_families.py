"""Every family of the registry against transformers.generate and against itself; what cannot be served is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from paceline.config import EngineSettings
from paceline.engine import attention
from paceline.engine.attention import ATTENTION_NAME, Window
from paceline.engine.drafter import Drafter
from paceline.engine.families import refuse_unservable, runner_for
from paceline.engine.load import load_model
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.runner import ModelRunner, Runner
from paceline.errors import ModelError
from paceline.speculation.local import LocalProposer
from tests import tiny
from tests.engine import families
from tests.engine.families import FAMILIES, model_of, runner_of
from tests.tiny import SHAPE

NAMES = [family.name for family in FAMILIES]
ALONE = [name for name in NAMES if isinstance(runner_of(name), PerSequenceRunner)]
PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 5, 17, 40)]
TOKENS = 12
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
OTHER = tiny.tiny_llama(seed=7)


def requests(**params: object) -> list[tiny.Request]:
    return [tiny.request(ids, str(n), max_tokens=TOKENS, **params) for n, ids in enumerate(PROMPTS)]


def drafts_of(runner: Runner) -> LocalProposer:
    return LocalProposer(Drafter(runner, tiny.kv_for(runner), max_batched_tokens=64, max_model_len=512))


def outputs(name: str, each: list[tiny.Request], **options: Any) -> list[list[int]]:
    engine = tiny.engine_for(model_of(name), runner=runner_of(name), **options)
    found = tiny.run(engine, *each)
    return [found[one.request_id] for one in each]


def from_config(model_type: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers_batched_raggedly_and_in_chunks(name: str) -> None:
    expected = [tiny.generate(model_of(name), ids, TOKENS) for ids in PROMPTS]
    assert outputs(name, requests(), max_batched_tokens=11) == expected
    # What says the same thing whatever it reads would prove nothing.
    assert max(len(set(tokens)) for tokens in expected) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_speculation_changes_no_sampled_token(name: str) -> None:
    plain = outputs(name, requests(**SEEDED))
    agreeing, disagreeing = drafts_of(runner_of(name)), drafts_of(tiny.ours(OTHER))
    drafted = [outputs(name, requests(**SEEDED), proposer=one, depth=5) for one in (agreeing, disagreeing)]
    assert drafted == [plain, plain]


@pytest.mark.parametrize("name", [*ALONE, "Gemma 2", "gpt-oss"])
def test_a_second_turn_on_a_cached_prefix_equals_a_fresh_start(name: str) -> None:
    engine = tiny.engine_for(model_of(name), runner=runner_of(name))
    first = tiny.run(engine, tiny.request(PROMPTS[3], "a", "s", max_tokens=TOKENS))["a"]
    second = (*PROMPTS[3], *first[:7], *tiny.prompt(9, seed=3))
    engine.add(tiny.request(second, "b", "s", max_tokens=TOKENS))
    found = [delta for _, delta in tiny.deltas(engine)]
    (metrics,) = [delta.metrics for delta in found if delta.metrics]
    tokens = [token for delta in found for token in delta.token_ids]
    assert (tokens, metrics.cached_tokens >= 47) == (tiny.generate(model_of(name), second, TOKENS), True)


def test_the_table_in_the_readme_is_in_step() -> None:
    readme = families.README.read_text()
    assert families.with_table(readme) == readme


def test_heads_that_a_model_repeats_are_kept_once() -> None:
    assert runner_of("Falcon, new decoder").kv_geometry().num_kv_heads == 2


def test_a_sliding_layer_reads_only_its_window() -> None:
    runner = runner_of("Mistral")
    kv = tiny.kv_for(runner)
    entry = kv.reserve(PROMPTS[3], 40)
    assert entry is not None
    runner.run([Window(entry, PROMPTS[3][:39], sample=0)])
    kv.append(entry, PROMPTS[3][:39])
    last = Window(entry, PROMPTS[3][39:], sample=1)
    before = runner.run([last])
    entry.keys[:, :, : 40 - families.WINDOW] = float("nan")
    entry.values[:, :, : 40 - families.WINDOW] = float("nan")
    assert torch.equal(runner.run([last]), before)


def test_masks_are_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = Window.causal_mask
    monkeypatch.setattr(Window, "causal_mask", lambda *a, **k: made.append(a) or original(*a, **k))
    runner = runner_of("Gemma 2")
    kv = tiny.kv_for(runner)
    windows = [Window(kv.reserve(ids, len(ids)), ids, sample=1) for ids in PROMPTS[1:]]  # type: ignore[arg-type]
    runner.run(windows)
    assert len(made) == 2 * len(windows)  # with a sliding window and without, however many layers


@pytest.mark.parametrize("ignored", ["softcap", "sinks", "sliding_window"])
def test_scores_that_are_not_the_model_s_are_refused(monkeypatch: pytest.MonkeyPatch, ignored: str) -> None:
    name = {"softcap": "Gemma 2", "sinks": "gpt-oss", "sliding_window": "Mistral"}[ignored]
    scoring = attention.Scoring
    monkeypatch.setattr(
        attention,
        "Scoring",
        lambda *given: scoring(**dict(zip(scoring.__slots__, given, strict=True)) | {ignored: None}),
    )
    runner = runner_for(copy.deepcopy(model_of(name)))
    # The model's own attention still is.
    assert isinstance(runner, PerSequenceRunner)
    assert "differ" in runner.why or "has the sliding window None" in runner.why


def test_a_mask_shorter_than_the_probe_is_missed_by_no_one() -> None:
    """A window of 4096 tokens changes nothing in a probe of 24: that it arrives is checked by itself."""
    model = from_config("llama", **SHAPE)
    model.config.sliding_window = 4096
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ModelError, match=r"layer 0 .* has the sliding window None, not 4096"):
        ModelRunner(model)


def test_logits_that_depend_on_the_batch_are_refused_with_the_difference() -> None:
    model = from_config("llama", **SHAPE)

    class Counting(LlamaForCausalLM):
        def forward(self, input_ids: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, *args, past_key_values=past_key_values, **kwargs)
            output.logits[..., 0] += 100 * input_ids.shape[1]
            return output

    model.__class__ = Counting
    with pytest.raises(ModelError, match=r"llama cannot be served: .* differ by \d.* in a prefill; .* differ by"):
        runner_for(model)


SMALL = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
MLA = {
    **SHAPE,
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({}, "t5 is an encoder-decoder"),
    "bart": ({}, "bart is an encoder-decoder"),
    "whisper": ({}, "whisper is an encoder-decoder"),
    "llava": ({}, "llava is no language model on its own"),
    "mamba": ({}, "mamba keeps a recurrent state"),
    "rwkv": ({}, "rwkv keeps a recurrent state"),
    "jamba": ({}, "jamba keeps a recurrent state"),
    "zamba2": ({}, "zamba2 keeps a recurrent state"),
}
REFUSED_BY_TRYING: dict[str, tuple[dict[str, Any], str]] = {
    "openai-gpt": ({"vocab_size": 199, "n_embd": 48, "n_layer": 2, "n_head": 3}, "takes no KV cache"),
    "lfm2": (SMALL | {"layer_types": ["conv", "full_attention", "conv"]}, "only 1 of its 3 layers keep"),
    "deepseek_v3": (MLA, "keys and values of different shapes"),
    "gemma4_text": (SHAPE | {"head_dim": 8}, "keys and values of different shapes"),
    "bert": (SHAPE, "logits differ"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_kind_that_cannot_be_served_is_refused_before_its_weights_are_read(family: str) -> None:
    config, reason = REFUSED[family]
    with pytest.raises(ModelError, match=reason):
        refuse_unservable(CONFIG_MAPPING[family](**config))


@pytest.mark.parametrize("family", REFUSED_BY_TRYING)
def test_a_family_that_does_not_fit_is_refused_with_the_reason(family: str) -> None:
    config, reason = REFUSED_BY_TRYING[family]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {family}")
    with pytest.raises(ModelError, match=f"{family} cannot be served: .*{reason}"):
        runner_for(from_config(family, **config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a tokenizer of numbered words."""
    vocabulary = {f"w{n}": n for n in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["Llama", "OPT", "GPT-J", "Falcon RW", "MPT", "BLOOM"])
def test_a_saved_model_answers_alike(name: str, folder: Path) -> None:
    model = copy.deepcopy(model_of(name))
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())  # so that half-precision products are taken where they run
    model.save_pretrained(folder)
    loaded = load_model(folder, EngineSettings(device="cpu", threads=1, kv_tokens=512))
    found = tiny.run(loaded.engine(), tiny.request(PROMPTS[2], max_tokens=TOKENS, ignore_eos=True))
    assert found["r"] == tiny.generate(model, PROMPTS[2], TOKENS)


def test_the_choices_say_why_a_model_runs_sequence_by_sequence(folder: Path) -> None:
    model_of("MPT").save_pretrained(folder)
    loaded = load_model(folder, EngineSettings(device="cpu", threads=1, kv_tokens=512))
    reasons = {choice.name: (choice.value, choice.reason) for choice in loaded.choices}
    assert reasons["attention"] == (
        "the model's own, sequence by sequence",
        "MptForCausalLM does not take Transformers' AttentionInterface",
    )


def test_a_folder_of_a_kind_that_cannot_be_served_is_refused_by_name(folder: Path) -> None:
    CONFIG_MAPPING["mamba"]().save_pretrained(folder)
    with pytest.raises(ModelError, match="mamba keeps a recurrent state"):
        load_model(folder, EngineSettings(device="cpu", threads=1))


def test_positions_that_change_with_the_length_end_where_they_change() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = SHAPE | {"original_max_position_embeddings": 64, "rope_parameters": rope}
    assert runner_for(from_config("phi3", **config)).max_model_len == 64


def test_a_model_that_states_no_limit_gets_the_default() -> None:
    assert runner_of("BLOOM").max_model_len == 2048


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_within_the_probe_s_tolerance(name: str) -> None:
    model = copy.deepcopy(model_of(name)).to(torch.bfloat16)
    assert type(runner_for(model)) is type(runner_of(name))


def test_a_model_left_with_its_own_attention_is_as_it_was() -> None:
    model = copy.deepcopy(model_of("StableLM"))
    runner_for(model)
    assert model.config._attn_implementation == model_of("StableLM").config._attn_implementation
