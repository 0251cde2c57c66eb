"""`paceline estimate`, from a configuration in a folder to tables and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTBigCodeConfig, LlamaConfig

from paceline.cli import estimate as command
from paceline.cli.estimate_tables import size
from paceline.models import ModelFiles
from tests import tiny
from tests.cli.conftest import Outcome, Run


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A Llama of 3 layers, 6 heads over 2 of keys and values, 512 positions, in bfloat16."""
    LlamaConfig(**tiny.SHAPE, dtype="bfloat16").save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.fixture
def octocoder(tmp_path: Path) -> str:
    config = GPTBigCodeConfig(
        n_embd=6144, n_layer=40, n_head=48, n_inner=24576, vocab_size=49152, n_positions=8192, eos_token_id=0
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def found(outcome: Outcome) -> dict[str, Any]:
    assert outcome.err == ""
    answer: dict[str, Any] = json.loads(outcome.out)
    return answer


def names(report: dict[str, Any]) -> list[str]:
    return [precision["name"] for precision in report["precisions"]]


def test_a_gpu_has_its_precisions(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--gpu-memory", "1", "--json"))
    assert names(report) == ["fp32", "bf16", "bnb-8bit", "bnb-4bit", "torchao-int8", "bnb-4bit-dq"]


def test_a_cpu_has_its_own(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--memory", "1", "--json"))
    assert names(report) == ["fp32", "fp16", "int8", "int4", "bnb-8bit", "bnb-4bit", "torchao-int8"]


def test_memory_is_this_machines_if_none_is_given(run: Run, config: str) -> None:
    from paceline.cli.hardware import read_gpus, read_memory

    gpus = read_gpus()
    here = gpus[0].memory if gpus else read_memory().total
    assert found(run("estimate", config, "--json"))["memory"] == here


def test_precisions_may_be_a_list(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--memory", "1", "--precision", "int8,int4", "--json"))
    assert names(report) == ["int8", "int4"]


def test_contexts_go_as_far_as_the_model(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--memory", "1", "--json"))
    assert [fit["context"] for fit in report["precisions"][0]["fits"]] == [512]


def test_contexts_may_be_lists_and_repeated(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--memory", "1", "--context", "64,32", "--context", "128", "--json"))
    assert [fit["context"] for fit in report["precisions"][0]["fits"]] == [32, 64, 128]


def test_int8_kv_takes_less(run: Run, config: str) -> None:
    options = ("estimate", config, "--memory", "1", "--precision", "fp32", "--json")
    plain, rounded = found(run(*options)), found(run(*options, "--kv-dtype", "int8"))
    tokens = [report["precisions"][0]["kv_bytes_per_token"] for report in (plain, rounded)]
    assert tokens == [[2 * 3 * 2 * 8 * 4], [2 * 3 * 2 * (8 + 4)]]


def test_a_draft_is_a_part_of_its_own(run: Run, config: str) -> None:
    report = found(run("estimate", config, "--draft", "smollm2-135m-draft", "--memory", "1", "--json"))
    assert len(report["precisions"][0]["parts"]) == 2


def test_the_published_8_bit_peak_is_in_the_report(run: Run, octocoder: str) -> None:
    options = ("--gpu-memory", "80", "--precision", "bnb-8bit", "--context", "128", "--max-batched-tokens", "64")
    report = found(run("estimate", octocoder, *options, "--json"))
    assert report["precisions"][0]["peak"] / 2**30 == pytest.approx(15.2, rel=0.05)


def test_the_tables_say_how_heads_are_shared(run: Run, config: str) -> None:
    assert "target: GQA, 6 of queries on 2" in run("estimate", config, "--gpu-memory", "1").out


def test_the_tables_say_that_a_sliding_window_frees_nothing(run: Run, tmp_path: Path) -> None:
    from transformers import MistralConfig

    MistralConfig(**tiny.SHAPE, sliding_window=11).save_pretrained(tmp_path)
    printed = run("estimate", str(tmp_path), "--gpu-memory", "1").out
    assert "3 of 3 layers see the last 11 tokens only; the KV cache keeps the keys and values of all tokens." in printed


def test_a_context_beyond_the_model_is_pointed_out(run: Run, config: str) -> None:
    printed = run("estimate", config, "--gpu-memory", "1", "--context", "4096").out
    assert "4096 tokens are beyond the model's own 512." in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "1", "--gpu-memory", "1"], "--gpu-memory, --memory: give the one the model runs in"),
        (["--memory", "1", "--context", "many"], "--context: 'many' is no number of tokens"),
        (["--memory", "1", "--precision", "bf16"], "precision: bf16 does not run on a CPU"),
        (["--memory", "1", "--measure"], "a configuration alone; --measure loads weights"),
        (["--memory", "1", "--measure", "--precision", "int8,int4"], "--measure: loads the model once"),
    ],
)
def test_what_cannot_be_answered_is_one_line(run: Run, config: str, options: list[str], message: str) -> None:
    outcome = run("estimate", config, *options)
    assert (outcome.code, outcome.err.count("\n"), message in outcome.err) == (1, 1, True)


def test_a_model_that_cannot_be_served_is_refused(run: Run, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    assert "t5 is an encoder-decoder" in run("estimate", str(tmp_path), "--memory", "1").err


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (2048, "2.00 KiB"), (45 << 20, "45.0 MiB"), (9 << 30, "9.00 GiB"), (10 << 30, "10.0 GiB")],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.fixture(scope="module")
def measured(smollm2: ModelFiles) -> command.Compared:
    """smollm2-135m in 8 bits, loaded by a process of its own; the context is that of the question, not of the load."""
    precision = command.precision_named("int8", "cpu")
    shape = command._shape(str(smollm2.path))
    asked = command.Question(str(smollm2.path), (shape,), "cpu", 1 << 30, (precision,), (2048,), 512, kv_int8=False)
    return command._compare(asked)


@pytest.mark.slow
def test_the_weights_measured_are_those_expected(measured: command.Compared) -> None:
    assert measured.measured.weights == pytest.approx(measured.expected.weights, rel=0.01)


@pytest.mark.slow
def test_the_kv_of_a_token_measured_is_that_expected(measured: command.Compared) -> None:
    assert measured.measured.kv_bytes_per_token == measured.kv_bytes_per_token


@pytest.mark.slow
def test_the_peak_measured_is_near_the_one_expected(measured: command.Compared) -> None:
    assert measured.measured.peak == pytest.approx(measured.expected.peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "library"), [("bnb-8bit", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_the_weights_measured_of_a_library_are_those_expected(tmp_path: Path, name: str, library: str) -> None:
    pytest.importorskip(library)
    tiny.tiny_llama().save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    precision, shape = command.precision_named(name, "cpu"), command._shape(str(tmp_path))
    asked = command.Question(str(tmp_path), (shape,), "cpu", 1 << 30, (precision,), (128,), 512, kv_int8=False)
    compared = command._compare(asked)
    assert compared.measured.weights == pytest.approx(compared.expected.weights, rel=0.02)


@pytest.mark.slow
def test_what_is_measured_is_shown_beside_the_estimate(
    run: Run, monkeypatch: pytest.MonkeyPatch, smollm2: ModelFiles, measured: command.Compared
) -> None:
    monkeypatch.setattr(command, "_compare", lambda _: measured)
    printed = run("estimate", "smollm2-135m", "--memory", "4", "--precision", "int8", "--measure").out
    assert "loaded in int8" in printed and "difference" in printed


def test_a_setting_the_engine_does_not_have_is_named(smollm2: ModelFiles) -> None:
    from paceline.bench.footprint import measure
    from paceline.errors import ConfigError

    with pytest.raises(ConfigError, match=r"engine\.nonsense: unknown key"):
        measure(smollm2.path, {"nonsense": "1"}, 8, 8)


def test_of_several_ranks_the_largest_share_is_sized(run: Run, config: str) -> None:
    whole = found(run("estimate", config, "--gpu-memory", "1", "--precision", "bf16", "--json"))
    half = found(
        run("estimate", config, "--gpu-memory", "1", "--precision", "bf16", "--tensor-parallel-size", "2", "--json")
    )
    assert half["tensor_parallel_size"] == 2
    assert [each["precisions"][0]["kv_bytes_per_token"][0] for each in (whole, half)] == [192, 96]
    weights = [each["precisions"][0]["parts"][0]["weights"] for each in (whole, half)]
    assert 0.5 <= weights[1] / weights[0] < 0.56


def test_a_size_that_the_heads_do_not_take_is_refused(run: Run, config: str) -> None:
    outcome = run("estimate", config, "--gpu-memory", "1", "--tensor-parallel-size", "4")
    assert outcome.code != 0
    assert "4 ranks cannot share 6 query heads over 2 KV heads" in outcome.err


def test_several_ranks_are_not_measured(run: Run, config: str) -> None:
    outcome = run("estimate", config, "--tensor-parallel-size", "2", "--measure")
    assert outcome.code != 0
    assert "--tensor-parallel-size" in outcome.err
