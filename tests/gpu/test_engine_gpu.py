"""The same engine on a GPU: the same tokens as transformers.generate there, and the same noise as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers
from paceline.speculation import coupling
from paceline.speculation.local import LocalProposer
from tests import tiny

pytestmark = pytest.mark.gpu

PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 5, 40, 100)]


@pytest.fixture(scope="module")
def model() -> tiny.LlamaForCausalLM:
    return tiny.tiny_llama().to("cuda")


def requests(**params: object) -> list[tiny.Request]:
    return [tiny.request(tokens, str(n), **params) for n, tokens in enumerate(PROMPTS)]


def test_greedy_equals_transformers(model: tiny.LlamaForCausalLM) -> None:
    found = tiny.run(tiny.engine_for(model), *requests())
    assert [found[str(n)] for n in range(len(PROMPTS))] == [tiny.generate(model, tokens) for tokens in PROMPTS]


def test_speculation_changes_no_sampled_token(model: tiny.LlamaForCausalLM) -> None:
    seeded = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
    plain = tiny.run(tiny.engine_for(model), *requests(**seeded))
    proposer = LocalProposer(tiny.drafter_for(model))
    assert tiny.run(tiny.engine_for(model, proposer=proposer), *requests(**seeded)) == plain


def test_a_session_keeps_its_cache(model: tiny.LlamaForCausalLM) -> None:
    engine = tiny.engine_for(model)
    answer = tuple(tiny.run(engine, tiny.request(PROMPTS[3], "a", "s"))["a"])
    second = (*PROMPTS[3], *answer, *tiny.prompt(90, seed=3))
    assert tiny.run(engine, tiny.request(second, "b", "s"))["b"] == tiny.generate(model, second)


@pytest.mark.parametrize("host_bytes", [0, 10**9], ids=["disk", "host"])
def test_a_session_comes_back_from_a_tier_with_the_tokens_it_had(
    model: tiny.LlamaForCausalLM, tmp_path: Path, host_bytes: int
) -> None:
    runner = tiny.ours(model)
    tiers = KVTiers(Slabs(tiny.geometry_of(runner), 512), host_bytes, KVFiles(tmp_path, "a model", 10**9, ttl_s=3600.0))
    engine = tiny.engine_for(model, runner=runner, tiers=tiers)
    answer = tuple(tiny.run(engine, tiny.request(PROMPTS[3], "a", "s"))["a"])
    engine.kv.evict(engine.kv.usage().total)
    second = (*PROMPTS[3], *answer, 5)
    assert tiny.run(engine, tiny.request(second, "b", "s"))["b"] == tiny.generate(model, second)
    assert engine.restores is not None and engine.restores.restored_tokens == len(second) - 2
    assert tiers.stop(60.0)


def test_noise_is_bit_equal_on_cpu_and_gpu() -> None:
    cpu, gpu = (coupling.random_bits(7, range(50), 49152, device) for device in ("cpu", "cuda"))
    assert torch.equal(cpu, gpu.cpu())


def test_gumbel_differs_by_less_than_a_near_tie() -> None:
    cpu, gpu = (coupling.gumbel(7, range(50), 49152, device) for device in ("cpu", "cuda"))
    assert (cpu - gpu.cpu()).abs().max() < 1e-12
