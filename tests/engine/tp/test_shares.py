"""Shares of a model, run by ranks that are threads, against the whole model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.backends import resolve_backends
from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.load import _load_runner
from paceline.engine.runner import Runner
from paceline.engine.tp.layers import join_ranks
from paceline.errors import ConfigError, EngineError, ModelError
from paceline.models import load_config
from paceline.models.draft_folder import DraftCard, write_draft
from paceline.models.lazy import empty_causal_lm
from paceline.models.sharding import ShardPlan
from paceline.models.shares import ShareWeights, _Files, load_share
from tests import tiny
from tests.engine.families import FAMILIES, model_of
from tests.engine.tp.threads import ThreadGroup, on_all_ranks, taking_turns
from tests.models import packings

IDS = list(tiny.prompt(23))
STEPS = ((0, 12), (12, 13), (13, 19), (19, 23))
SMOLLM2 = {
    "hidden_size": 144,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 288,
    "tie_word_embeddings": True,
}
LEAN = ["Llama", "Granite", "SmolLM3"]
MORE_LEAN = ["Mistral", "Qwen2", "Qwen2, sliding", "Qwen3"]
OWN_CODE = ["Gemma 3 (text)", "Cohere", "GLM-4"]
MORE_OWN_CODE = ["Gemma", "Gemma 2", "Phi", "Phi-3", "GPT-NeoX", "StarCoder2", "Cohere 2", "OLMo"]
"""Most of them are run by processes in test_equality."""


def some(names: list[str], more: list[str]) -> pytest.MarkDecorator:
    """`more` are slow."""
    return pytest.mark.parametrize("name", [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in more)])


@pytest.fixture(autouse=True)
def one_rank_loads_at_a_time() -> Iterator[None]:
    with taking_turns():
        yield


def saved(path: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(path)
    return path


def whole_logits(model: PreTrainedModel, ids: list[int] = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def step_by_step(runner: Runner, geometry: KVGeometry | None = None) -> torch.Tensor:
    """Logits of all of IDS: a prefill, a decode step, verifications."""
    geometry = geometry or runner.kv_geometry()
    kv = SlabKVCache(geometry, 64, 64, memory=runner.kv_memory(geometry, 64, 64))
    entry = kv.reserve(IDS, len(IDS))
    assert entry is not None
    logits = []
    for start, end in STEPS:
        logits.append(runner.run([Window(entry, IDS[start:end], sample=end - start)]))
        kv.append(entry, IDS[start:end])
    return torch.cat(logits)


def loaded(path: Path, group: ThreadGroup | None, **settings: Any) -> tuple[Runner, dict[str, str]]:
    chosen = EngineSettings(device="cpu", threads=1, **settings)
    runner, choices = _load_runner(path, resolve_backends(chosen), chosen, group)
    return runner, {choice.name: choice.value for choice in choices}


def sharded(path: Path, size: int, *, native: bool = False, **settings: Any) -> tuple[list[torch.Tensor], str]:
    """Each rank's logits, and the forward pass that was chosen."""

    def work(group: ThreadGroup) -> tuple[torch.Tensor, str]:
        runner, choices = loaded(path, group, **settings)
        return step_by_step(runner), choices["forward pass"]

    found = on_all_ranks(size, work, native=native)
    (way,) = {way for _, way in found}
    return [logits for logits, _ in found], way


def require_same(found: list[torch.Tensor], expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """1e-4 of the logits' spread, and the same bits on all ranks."""
    for logits in found:
        assert torch.equal(logits, found[0])
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.std()))


@pytest.mark.parametrize("native", [False, True])
@some(LEAN, MORE_LEAN)
def test_two_lean_ranks_compute_what_the_model_does(tmp_path: Path, name: str, native: bool) -> None:
    model = model_of(name)
    found, way = sharded(saved(tmp_path, model), 2, native=native)
    assert way == "lean"
    require_same(found, whole_logits(model))


@some(OWN_CODE, MORE_OWN_CODE)
def test_two_ranks_of_a_familys_own_code_compute_what_the_model_does(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    found, way = sharded(saved(tmp_path, model), 2)
    assert way == "transformers"
    require_same(found, whole_logits(model))


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_a_lean_familys_own_code_runs_over_shares_as_well(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    found, way = sharded(saved(tmp_path, model), 2, attn_implementation="eager")
    assert way == "transformers"
    require_same(found, whole_logits(model))


@pytest.mark.parametrize(("size", "heads"), [(2, [2, 1]), (3, [1, 1, 1])])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_heads_need_not_divide(tmp_path: Path, size: int, heads: list[int], attention: str) -> None:
    model = tiny.tiny_llama(**SMOLLM2)
    saved(tmp_path, model)

    def work(group: ThreadGroup) -> tuple[int, torch.Tensor]:
        runner, _ = loaded(tmp_path, group, attn_implementation=attention)
        return runner.kv_geometry().num_kv_heads, step_by_step(runner)

    found = on_all_ranks(size, work)
    assert [kept for kept, _ in found] == heads
    require_same([logits for _, logits in found], whole_logits(model))


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 2), (1, 3), (2, 6)])
def test_ranks_share_a_kv_head(tmp_path: Path, kv_heads: int, size: int, attention: str) -> None:
    model = tiny.tiny_llama(num_key_value_heads=kv_heads)
    found, _ = sharded(saved(tmp_path, model), size, attn_implementation=attention)
    require_same(found, whole_logits(model))


@pytest.mark.parametrize("name", ["Phi-3", "StarCoder2", "Gemma"])
def test_ranks_of_a_familys_own_code_share_a_kv_head(tmp_path: Path, name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    changed = {**family.config, "num_key_value_heads": 1}
    model = type(family)(name, family.model_type, "", "", changed).built()
    model.set_attn_implementation("eager")
    found, _ = sharded(saved(tmp_path, model), 2)
    require_same(found, whole_logits(model))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("native", [False, True])
def test_rounded_weights_of_ranks_are_those_of_one_process(tmp_path: Path, weights: Any, native: bool) -> None:
    saved(tmp_path, tiny.tiny_llama(hidden_size=192, intermediate_size=256, num_key_value_heads=2))
    settings = {"weight_dtype": weights, "linear_backend": "auto"}
    alone, _ = loaded(tmp_path, None, **settings)
    found, way = sharded(tmp_path, 2, native=native, **settings)
    assert way == "lean"
    require_same(found, step_by_step(alone), 1e-3)


def test_kernels_sum_on_their_own_where_they_can(tmp_path: Path) -> None:
    saved(tmp_path, tiny.tiny_llama(hidden_size=192, intermediate_size=256))

    def work(group: ThreadGroup) -> int:
        runner, _ = loaded(tmp_path, group, weight_dtype="int8")
        before = group.native_calls
        step_by_step(runner)
        return group.native_calls - before

    layers = 3
    assert on_all_ranks(2, work, native=True) == [2 * layers * len(STEPS)] * 2


def test_a_sum_that_a_rank_does_not_join_fails_the_step(tmp_path: Path) -> None:
    saved(tmp_path, tiny.tiny_llama(hidden_size=192, intermediate_size=256))

    groups: dict[int, ThreadGroup] = {}

    def work(group: ThreadGroup) -> None:
        groups[group.rank] = group
        runner, _ = loaded(tmp_path, group, weight_dtype="int8")
        before = groups[0].native_calls
        if group.rank == 1:
            group.all_reduce(torch.zeros(len(IDS[:12]), 192))  # the embedding's, and no more
            while groups[0].native_calls == before:  # rank 0 is not in its layers yet
                time.sleep(0.001)
            group.close()
        else:
            step_by_step(runner)

    with pytest.raises(EngineError, match="lost each other"):
        on_all_ranks(2, work, native=True)


def test_ranks_make_the_same_number_of_calls(tmp_path: Path) -> None:
    saved(tmp_path, tiny.tiny_llama(**SMOLLM2))

    def work(group: ThreadGroup) -> int:
        runner, _ = loaded(tmp_path, group)
        runner.key_shift()
        step_by_step(runner)
        return group.calls

    first, second = on_all_ranks(2, work)
    assert first == second > 0


def test_a_family_that_deepspeed_alone_knows_is_shared(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    model = model_of("OPT")
    found, _ = sharded(saved(tmp_path, model), 2)
    require_same(found, whole_logits(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_shares_keep_the_type_asked_for(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.tiny_llama()
    plan = ShardPlan.of(load_config(saved(tmp_path, model)), 2)

    shares = [load_share(tmp_path, plan, rank, dtype=dtype, device="cpu") for rank in range(2)]
    assert {weight.dtype for share in shares for weight in share.parameters()} == {dtype}

    def work(group: ThreadGroup) -> torch.Tensor:
        share = shares[group.rank]
        join_ranks(share, plan, group)
        return whole_logits(share)

    found = on_all_ranks(2, work)
    require_same(found, whole_logits(model.to(dtype)), tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_reads_more_than_its_share(tmp_path: Path, rank: int, tied: bool) -> None:
    config = load_config(saved(tmp_path, tiny.tiny_llama(**SMOLLM2 | {"tie_word_embeddings": tied})))
    plan = ShardPlan.of(config, 2)
    weights = ShareWeights(tmp_path, _Files(tmp_path), empty_causal_lm(config, dtype=torch.float32), plan, rank)
    read = sum(weights[name].untyped_storage().nbytes() for name in weights if name not in plan.tied)
    assert read == plan.share_bytes(rank, 4)


def test_a_bias_of_what_is_summed_is_the_first_ranks(tmp_path: Path) -> None:
    path = saved(tmp_path, model_of("GPT-NeoX"))
    plan = ShardPlan.of(load_config(path), 2)
    first, second = (load_share(path, plan, rank, dtype=None, device="cpu") for rank in range(2))
    name = f"{plan.summed[0]}.bias"
    assert torch.equal(first.get_parameter(name), model_of("GPT-NeoX").get_parameter(name))
    assert not second.get_parameter(name).any()


def test_integers_of_a_checkpoint_are_cut_after_they_are_unpacked(tmp_path: Path) -> None:
    reference = packings.write(tmp_path, packings.compressed_settings("pack-quantized"), packings.packed)
    found, _ = sharded(tmp_path, 2)
    require_same(found, whole_logits(reference), 1e-3)  # activations of 16 bits, in groups


def test_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, tiny.tiny_llama())
    plan = ShardPlan.of(tiny.tiny_llama(tie_word_embeddings=True, vocab_size=300).config, 2)
    with pytest.raises(
        ModelError, match=r"weights are not in the files as the model has them.*tensor_parallel_size: 1"
    ):
        load_share(tmp_path, plan, 0, dtype=None, device="cpu")


def test_a_family_that_runs_sequence_by_sequence_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, model_of("Nemotron"))
    with pytest.raises(
        ModelError, match=r"nemotron: (it runs sequence by sequence|neither) .*; set tensor_parallel_size: 1"
    ):
        on_all_ranks(2, lambda group: loaded(tmp_path, group))


def test_ranks_of_a_distilled_draft_share_its_own_vocabulary(tmp_path: Path) -> None:
    model = tiny.tiny_llama(hidden_size=192, intermediate_size=256, tie_word_embeddings=True)
    tokens = torch.arange(tiny.VOCAB)
    card = DraftCard(target="tiny", fingerprint="", vocab_size=tiny.VOCAB)
    write_draft(tmp_path, model, tokens, tokens, card, "")
    alone, _ = loaded(tmp_path, None)
    found, way = sharded(tmp_path, 2)
    assert way == "lean"
    require_same(found, step_by_step(alone), 1e-3)


@pytest.mark.parametrize("name", ["torchao_int8", "bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_a_library_rounds_each_share(tmp_path: Path, name: Any) -> None:
    pytest.importorskip(name.partition("_")[0])
    saved(tmp_path, tiny.tiny_llama(hidden_size=384, intermediate_size=256))  # whole blocks of 64 a rank
    alone, _ = loaded(tmp_path, None, quantization=name)
    found, way = sharded(tmp_path, 2, quantization=name)
    assert way == "transformers"
    expected = step_by_step(alone)
    assert torch.equal(*found)
    # Libraries round activations, too, a rank those of its part.
    assert float((found[0] - expected).square().mean().sqrt()) < 0.3 * float(expected.std())


def test_a_share_is_not_rounded_twice(tmp_path: Path) -> None:
    packings.write(tmp_path, packings.compressed_settings("pack-quantized"), packings.packed)
    with pytest.raises(ConfigError, match="the checkpoint is quantized already, by compressed-tensors"):
        on_all_ranks(2, lambda group: loaded(tmp_path, group, quantization="torchao_int8"))


def test_layers_over_several_devices_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, tiny.tiny_llama())
    with pytest.raises(ConfigError, match=r"engine\.device_map"):
        on_all_ranks(2, lambda group: loaded(tmp_path, group, device_map="auto"))
