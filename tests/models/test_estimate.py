"""The arithmetic of an estimate, against published peaks and against the libraries whose bytes it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPTBigCodeConfig

from paceline.config import EngineSettings
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.packed import linear_kernels, packed
from paceline.engine.shape import model_shape
from paceline.errors import ConfigError
from paceline.models.estimate import (
    GIB,
    PROCESS,
    Footprint,
    KVShape,
    Load,
    Matrix,
    ModelShape,
    Step,
    activation_bytes,
    fit,
    footprint,
    together,
    weight_bytes,
)
from paceline.models.precisions import FLOAT32, HALF, MATRIX, PRECISIONS, Precision, precision_named

SHORT = Step(rows=64, sampled=1, context=128)
"""A short prompt and 60 tokens."""
KV = KVShape(layers=3, heads=6, kv_heads=2, head_dim=8)


def shape(**changed: Any) -> ModelShape:
    """Two layers' worth of matrices, an embedding of 640 numbers, 20 others; all numbers easy to add up."""
    plain = ModelShape(
        family="made up",
        parameters=2 * 64 * 32 + 640 + 20,
        matrices=(Matrix(64, 32, count=2),),
        head=Matrix(20, 32),
        tied=True,
        embedding=640,
        experts=0,
        buffers=12,
        hidden=32,
        width=64,
        kv=KV,
        max_model_len=128,
    )
    return replace(plain, **changed)


@pytest.fixture(scope="module")
def octocoder() -> ModelShape:
    """15.5 billion parameters with one head of keys and values."""
    return model_shape(
        GPTBigCodeConfig(
            n_embd=6144,
            n_layer=40,
            n_head=48,
            n_inner=24576,
            multi_query=True,
            vocab_size=49152,
            n_positions=8192,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.mark.parametrize(("name", "published"), [("bf16", 29.0), ("bnb-8bit", 15.2), ("bnb-4bit", 9.5)])
def test_the_peak_of_octocoder_is_the_published_one_within_5_percent(
    octocoder: ModelShape, name: str, published: float
) -> None:
    precision = precision_named(name, "cuda")
    if precision.copies:
        # Published with the library's defaults: a float32 copy beside the one in 16 bits.
        precision = replace(precision, copies=HALF + FLOAT32)
    found = footprint(octocoder, precision, SHORT, SHORT.context, kv_int8=False)
    assert found.peak / GIB == pytest.approx(published, rel=0.05)


def test_16k_tokens_of_multi_query_kv_are_below_400_mb(octocoder: ModelShape) -> None:
    assert 16 * 1024 * octocoder.kv.bytes_per_token(2) < 400e6


@pytest.mark.parametrize(("kv_heads", "sharing"), [(6, "MHA"), (2, "GQA"), (1, "MQA")])
def test_sharing_goes_by_the_heads_of_keys(kv_heads: int, sharing: str) -> None:
    assert replace(KV, kv_heads=kv_heads).sharing == sharing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_takes_what_the_engine_says(dtype: torch.dtype) -> None:
    geometry = KVGeometry(KV.layers, KV.kv_heads, KV.head_dim, dtype, torch.device("cpu"))
    assert KV.bytes_per_token(dtype.itemsize) == geometry.bytes_per_token


def test_int8_kv_takes_what_the_engine_says() -> None:
    geometry = KVGeometry(KV.layers, KV.kv_heads, KV.head_dim, torch.float32, torch.device("cpu")).quantized()
    assert KV.bytes_per_token(4, int8=True) == geometry.bytes_per_token


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [33, 48])
@pytest.mark.parametrize("group", [32, 128])
def test_a_packed_weight_takes_what_our_kernels_take(bits: int, outputs: int, group: int) -> None:
    kernels = linear_kernels()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    made = packed(kernels, torch.randn(outputs, 64), None, bits, round_group=group)
    assert made is not None
    assert MATRIX[f"int{bits}"](outputs, 64, 4) == made.nbytes


def test_inputs_that_are_no_groups_are_not_packed() -> None:
    assert MATRIX["int4"](48, 33, 4) == 48 * 33 * 4


@pytest.mark.parametrize(("form", "double"), [("nf4", False), ("nf4_double", True)])
@pytest.mark.parametrize("outputs", [80, 1000])
def test_a_4_bit_weight_takes_what_bitsandbytes_takes(form: str, double: bool, outputs: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, state = functional.quantize_4bit(
        torch.randn(outputs, 96), blocksize=64, quant_type="nf4", compress_statistics=double
    )
    parts = [weight, state.absmax, state.code]
    if double:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    assert MATRIX[form](outputs, 96, 2) == sum(part.nbytes for part in parts)


def test_an_8_bit_weight_takes_what_bitsandbytes_takes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, scales, _ = functional.int8_vectorwise_quant(torch.randn(80, 96).half())
    assert MATRIX["row_int8"](80, 96, 2) == weight.nbytes + scales.nbytes


def test_an_8_bit_weight_takes_what_torchao_takes() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(96, 80, bias=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    assert MATRIX["row_int8"](80, 96, 2) == linear.weight.qdata.nbytes + linear.weight.scale.nbytes


def test_bitsandbytes_leaves_an_untied_head_in_16_bits() -> None:
    tied, untied = shape(), shape(tied=False, parameters=shape().parameters + 640)
    quantized = precision_named("bnb-4bit", "cuda")
    assert weight_bytes(untied, quantized) - weight_bytes(tied, quantized) == 640 * 2


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_lean_embedding_tied_to_a_packed_head_is_kept_once(name: str) -> None:
    tied, precision = shape(lean=True), precision_named(name, "cpu")
    apart = replace(tied, tied=False, parameters=tied.parameters + 640)
    assert weight_bytes(apart, precision) - weight_bytes(tied, precision) == 640 * 4


def test_the_head_has_8_bits_beside_layers_of_4() -> None:
    assert precision_named("int4", "cpu").head == "int8"


@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-4bit", "torchao-int8"])
def test_a_library_on_a_cpu_leaves_all_else_in_float32(name: str) -> None:
    layers = 2 * MATRIX[precision_named(name, "cpu").matrix](64, 32, FLOAT32)
    assert weight_bytes(shape(lean=True), precision_named(name, "cpu")) == layers + (640 + 20) * FLOAT32 + 12


def test_experts_are_not_quantized() -> None:
    with_experts = shape(experts=1000, parameters=shape().parameters + 1000)
    quantized = precision_named("bnb-4bit", "cuda")
    assert weight_bytes(with_experts, quantized) - weight_bytes(shape(), quantized) == 1000 * 2


def test_kept_scores_grow_with_the_context() -> None:
    long, short = Step(8, 1, 4096), Step(8, 1, 2048)
    bf16, kept = precision_named("bf16", "cuda"), shape(scores_kept=True)
    assert activation_bytes(kept, bf16, long) - activation_bytes(kept, bf16, short) == 8 * 2048 * 6 * (2 + 8)


def test_fused_scores_do_not() -> None:
    bf16 = precision_named("bf16", "cuda")
    assert activation_bytes(shape(), bf16, Step(8, 1, 4096)) == activation_bytes(shape(), bf16, Step(8, 1, 2048))


def test_the_peak_is_of_loading_where_that_takes_more() -> None:
    assert Footprint(weights=10, kv=1, activations=1, working=0, libraries=0, loading=20).peak == 20


def test_what_models_take_in_turns_is_taken_once() -> None:
    target = Footprint(weights=100, kv=10, activations=7, working=3, libraries=5, loading=120)
    draft = Footprint(weights=20, kv=2, activations=4, working=1, libraries=5, loading=21)
    assert together([target, draft]) == Footprint(120, 12, 7, 3, 5, loading=140)


def test_sessions_fill_what_is_left() -> None:
    bf16, load = precision_named("bf16", "cuda"), Load(context=100, rows=16, sampled=1)
    fixed = footprint(shape(), bf16, load.step, 0, kv_int8=False).running
    session = 100 * KV.bytes_per_token(2)
    assert fit([shape()], bf16, load, PROCESS["cuda"] + fixed + 3 * session).sessions == 3


def test_one_byte_less_is_one_session_less() -> None:
    bf16, load = precision_named("bf16", "cuda"), Load(context=100, rows=16, sampled=1)
    fixed = footprint(shape(), bf16, load.step, 0, kv_int8=False).running
    session = 100 * KV.bytes_per_token(2)
    assert fit([shape()], bf16, load, PROCESS["cuda"] + fixed + 3 * session - 1).sessions == 2


def test_none_fit_where_the_weights_do_not() -> None:
    load = Load(context=100, rows=16, sampled=1)
    assert fit([shape()], precision_named("bf16", "cuda"), load, PROCESS["cuda"] + 1000).kv_tokens == 0


def test_a_draft_takes_kv_beside_its_target() -> None:
    bf16, load = precision_named("bf16", "cuda"), Load(context=100, rows=16, sampled=1)
    memory = PROCESS["cuda"] + GIB
    alone, both = (fit(models, bf16, load, memory).kv_tokens for models in ([shape()], [shape(), shape()]))
    assert both == pytest.approx(alone / 2, rel=1e-3)


def test_a_precision_of_another_device_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"int4 does not run on a GPU.*give --memory for a CPU"):
        precision_named("int4", "cuda")


def test_an_unknown_precision_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown 'int3'; on a CPU there are fp32, fp16, int8, int4"):
        precision_named("int3", "cpu")


def test_names_are_unique_on_a_device() -> None:
    assert len({(each.name, each.device) for each in PRECISIONS}) == len(PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda each: f"{each.name}, {each.device}")
def test_the_settings_of_a_precision_are_the_engines(precision: Precision) -> None:
    assert EngineSettings(**precision.settings).model_dump(include=set(precision.settings)) == precision.settings
