"""A model on two GPUs against the same on one: what it computes, by graphs or not, by either kind of sums."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")

from paceline.config import EngineSettings, SpeculationSettings
from paceline.engine.attention import Window
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.load import LoadedModel, load_model
from paceline.speculation.local import LocalProposer
from tests import tiny
from tests.gpu.test_paged_gpu import FAMILIES, LOGITS, SHAPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two GPUs"),
]

TEXT = tuple(token * 5 % SHAPE["vocab_size"] for token in tiny.prompt(400, seed=1))
STEPS = ((0, 200), (200, 201), (201, 207), (207, 223), (223, 301))
"""A prompt, a decode, verifications, and more rows than ranks write to each other."""
SETTINGS: dict[str, Any] = {"kv_tokens": 4096, "max_model_len": 1024, "max_num_seqs": 8, "collective_timeout_s": 60}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    _save(path, request.param)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    _save(path, "llama")
    return path


def _save(path: Path, family: str) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SHAPE | {"tie_word_embeddings": False} | FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    tiny.save_tokenizer(path)


def loaded(path: Path, ranks: int, **settings: Any) -> Iterator[LoadedModel]:
    model = load_model(path, EngineSettings(**SETTINGS | {"tensor_parallel_size": ranks} | settings))
    try:
        yield model
    finally:
        model.close()


def logits_of(model: LoadedModel) -> list[torch.Tensor]:
    geometry = model.kv_geometry
    memory = model.runner.kv_memory(geometry, 1024, 1024)
    kv = SlabKVCache(geometry, 1024, 1024, memory=memory)
    entry = kv.reserve(TEXT, len(TEXT))
    assert entry is not None
    found = []
    for start, end in STEPS:
        found.append(model.runner.run([Window(entry, TEXT[start:end], sample=end - start)]).float().cpu())
        kv.append(entry, TEXT[start:end])
    return found


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("collectives", ["peer", "nccl"])
def test_two_ranks_compute_what_one_does(folder: Path, collectives: str) -> None:
    (expected,) = (logits_of(model) for model in loaded(folder, 1))
    (found,) = (logits_of(model) for model in loaded(folder, 2, collectives=collectives))
    assert max(away(*pair) for pair in zip(found, expected, strict=True)) < LOGITS


@pytest.mark.parametrize("settings", [{"weight_dtype": "int8"}, {"compile": False}, {"attn_implementation": "sdpa"}])
def test_two_ranks_compute_it_by_any_backend(llama: Path, settings: dict[str, Any]) -> None:
    (expected,) = (logits_of(model) for model in loaded(llama, 1))
    (found,) = (logits_of(model) for model in loaded(llama, 2, **settings))
    assert max(away(*pair) for pair in zip(found, expected, strict=True)) < LOGITS


def test_steps_ahead_give_what_steps_do(llama: Path) -> None:
    for model in loaded(llama, 2):
        plain = tiny.run(model.engine(), tiny.request(TEXT[:50], temperature=0.8, seed=5, max_tokens=64))
        settings = SpeculationSettings(depth=4, prompt_lookup_num_tokens=4)
        drafts = LocalProposer(model.drafter())
        verified = tiny.run(
            model.engine(drafts, settings), tiny.request(TEXT[:50], temperature=0.8, seed=5, max_tokens=64)
        )
    assert len(plain["r"]) == 64
    assert sum(a == b for a, b in zip(plain["r"], verified["r"], strict=True)) >= 48


def test_many_streams_outlive_their_window(llama: Path) -> None:
    for model in loaded(llama, 2):
        engine = model.engine()
        requests = [
            tiny.request(
                TEXT[: 20 + n], f"r{n}", f"s{n}", temperature=0.8, seed=n, max_tokens=200, ctx_size=128, ignore_eos=True
            )
            for n in range(6)
        ]
        found = tiny.run(engine, *requests)
        export = engine.kv.export_session("s1")
    assert [len(tokens) for tokens in found.values()] == [200] * 6
    assert export is not None and export.keys.shape[1] == SHAPE["num_key_value_heads"]


def test_a_rank_that_is_killed_ends_the_others_step() -> None:
    """In a process of its own, which a GPU that gave up leaves unusable."""
    script = subprocess.run(
        [sys.executable, "-m", "tests.gpu.test_ranks_gpu"], capture_output=True, text=True, timeout=240, check=False
    )
    assert "ended:" in script.stdout, script.stdout + script.stderr[-2000:]


def _kill_a_rank() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        _save(Path(scratch), "llama")
        model = load_model(
            Path(scratch), EngineSettings(**SETTINGS | {"collective_timeout_s": 5}, tensor_parallel_size=2)
        )
        engine = model.engine()
        engine.add(tiny.request(TEXT[:50], max_tokens=900, ignore_eos=True))
        for number in range(1000):
            if number == 20:
                os.kill(model.runner.leader.pids[1], signal.SIGKILL)  # type: ignore[attr-defined]
            try:
                engine.step()
            except BaseException as error:
                print(f"ended: {type(error).__name__}: {error}", flush=True)
                os._exit(0)


if __name__ == "__main__":
    _kill_a_rank()
