"""Which attention kernel and which layout of the KV cache a machine gets, and what it refuses by the field's name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from paceline.config import EngineSettings
from paceline.engine import backends
from paceline.engine.attention import Window
from paceline.engine.backends import attention_for, resolve_backends
from paceline.engine.gpu import kinds
from paceline.engine.lean import LeanRunner
from paceline.engine.load import LoadedModel, load_model
from paceline.engine.runner import ModelRunner
from paceline.errors import ConfigError
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def settings(**given: object) -> EngineSettings:
    return EngineSettings.model_validate(given)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any attention library."""
    monkeypatch.setattr(backends, "missing", lambda name: f"no {name}")


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all of them."""
    monkeypatch.setattr(backends, "missing", lambda _: None)


def refused(field: str, device: torch.device, **given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        attention_for(settings(**given), device)
    assert caught.value.param == f"engine.{field}" and caught.value.message.startswith(f"engine.{field}: ")
    return caught.value.message


# Attention.


def test_on_a_cpu_auto_is_left_to_the_forward_pass() -> None:
    assert attention_for(settings(), CPU)[0] == "auto"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_pytorchs_attention_runs_anywhere(name: str, device: torch.device) -> None:
    assert attention_for(settings(attn_implementation=name), device) == (name, "as configured")


@pytest.mark.parametrize("name", ["triton", "flash_attention_2", "flash_attention_3", "varlen_attn"])
def test_a_gpus_attention_is_refused_on_a_cpu_with_what_runs_there(complete: None, name: str) -> None:
    message = refused("attn_implementation", CPU, attn_implementation=name)
    assert message.endswith(f"{name} needs a GPU; on a CPU set auto, sdpa or eager")


def test_on_a_gpu_auto_is_our_kernel(complete: None) -> None:
    assert attention_for(settings(), GPU)[0] == "triton"


def test_a_gpu_without_triton_gets_sdpa_and_the_reason(lacking: None) -> None:
    name, reason = attention_for(settings(), GPU)
    assert (name, "no triton" in reason) == ("sdpa", True)


def test_int8_keys_take_sdpa_on_a_gpu(complete: None) -> None:
    name, reason = attention_for(settings(kv_dtype="int8"), GPU)
    assert (name, "int8" in reason) == ("sdpa", True)


@pytest.mark.parametrize("name", backends.BLOCK_READERS)
def test_int8_keys_are_refused_where_a_kernel_is_named_that_reads_none(complete: None, name: str) -> None:
    assert name in refused("kv_dtype", GPU, kv_dtype="int8", attn_implementation=name)


@pytest.mark.parametrize("name", ["triton", "flash_attention_3", "varlen_attn"])
def test_a_kernel_that_is_not_installed_is_refused_with_what_it_lacks(lacking: None, name: str) -> None:
    assert refused("attn_implementation", GPU, attn_implementation=name).endswith(f"no {name}")


# Layout.


@pytest.mark.parametrize("name", backends.BLOCK_READERS)
@pytest.mark.parametrize(("layout", "paged"), [("auto", True), ("paged", True), ("static", False)])
def test_what_reads_blocks_gets_them_in_one_pool(name: str, layout: str, paged: bool) -> None:
    assert backends._cache(settings(cache_implementation=layout), GPU, name)[0] is paged


@pytest.mark.parametrize(("layout", "paged"), [("auto", False), ("paged", True), ("static", False)])
def test_pytorchs_attention_gets_contiguous_memory_unless_blocks_are_asked_for(layout: str, paged: bool) -> None:
    assert backends._cache(settings(cache_implementation=layout), GPU, "sdpa")[0] is paged


def test_blocks_are_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU; set auto, which commits a CPU's memory page by page") as caught:
        resolve_backends(settings(device="cpu", cache_implementation="paged"))
    assert caught.value.param == "engine.cache_implementation"


def test_the_choices_name_attention_and_layout() -> None:
    found = {choice.name: choice.value for choice in resolve_backends(settings(device="cpu")).choices}
    assert (found["kv layout"], "attention" in found) == ("static", True)


# What a kernel lacks.


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("triton", "comes with PyTorch for CUDA"), ("flash_attention_3", "build it from its sources with paged KV")],
)
def test_what_is_not_installed_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch, name: str, remedy: str) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda _: None)
    assert remedy in (kinds.missing(name) or "")


def test_what_is_installed_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda _: object())
    assert [kinds.missing(name) for name in ("triton", "flash_attention_3", "flash_attention_2")] == [None] * 3


def test_an_older_pytorchs_varlen_attention_reads_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda *_: None)
    assert "PyTorch 2.13" in (kinds.missing("varlen_attn") or "")


# A named kernel is the one that runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.tiny_llama().save_pretrained(path)
    tiny.save_tokenizer(path)
    return path


def loaded(folder: Path, attention: str) -> LoadedModel:
    return load_model(folder, settings(device="cpu", threads=1, kv_tokens=512, attn_implementation=attention))


def logits(model: LoadedModel) -> torch.Tensor:
    kv, prompt = tiny.kv_for(model.runner), tiny.prompt(20)
    entry = kv.reserve(prompt, 20)
    assert entry is not None
    return model.runner.run([Window(entry, prompt, sample=20)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_named_attention_changes_the_path_and_not_the_logits(
    monkeypatch: pytest.MonkeyPatch, folder: Path, attention: str
) -> None:
    from paceline.engine import attention as ragged

    called = []
    sdpa, eager = ragged._attend, ragged._attend_explicitly
    monkeypatch.setattr(ragged, "_attend", lambda *args: called.append("sdpa") or sdpa(*args))
    monkeypatch.setattr(ragged, "_attend_explicitly", lambda *args: called.append("eager") or eager(*args))
    own, named = loaded(folder, "auto"), loaded(folder, attention)
    assert isinstance(own.runner, LeanRunner) and isinstance(named.runner, ModelRunner)
    called.clear()
    found = logits(named)
    assert set(called) == {attention}
    assert torch.allclose(found, logits(own), atol=2e-2)  # our products' weights are in half precision


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pytorchs_attention_says_the_same_over_blocks(attention: str) -> None:
    model = tiny.tiny_llama()
    runner = tiny.ours(model)
    runner.attend_as(attention, paged=True)
    each = [tiny.request(tiny.prompt(n, seed=n), str(n)) for n in (1, 30, 70)]
    engine = tiny.engine_for(model, runner=runner)
    assert tiny.run(engine, *each) == tiny.run(tiny.engine_for(model), *each)
    assert engine.kv.memory.__class__.__name__ == "BlockPool"


@pytest.mark.parametrize(("disabled", "reads"), [(True, False), (False, True)])
def test_a_flash_attention_built_without_paged_kv_is_none(
    disabled: bool, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"FLASHATTENTION_DISABLE_PAGEDKV": disabled}
    (tmp_path / "fa3_fwd_interface.py").write_text("")
    (tmp_path / "fa3_fwd_config.py").write_text(f"CONFIG = {{'build_flags': {flags}}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fa3_fwd_config", raising=False)
    assert (kinds.missing("flash_attention_3") is None) is reads
