"""Ways to compute a linear layer: what each keeps of the weights, and that only such a one is chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import ComputeDtype, EngineSettings
from paceline.engine import backends, products
from paceline.engine.backends import resolve_backends
from paceline.engine.lean import _rows, lean_runner
from paceline.engine.native import Kernels, kernels
from paceline.engine.packed import (
    ACTIVATIONS,
    FLAGS,
    Activations,
    LinearKernels,
    PackedWeight,
    linear_kernels,
    packed,
)
from paceline.engine.products import (
    BACKENDS,
    KEEPING,
    REQUEST,
    LinearBackends,
    Packed,
    Packer,
    Product,
    Times,
    measured,
    replace_linears,
)
from paceline.errors import ConfigError
from paceline.models.quantization import LibraryQuantization
from tests import tiny

BITS = (4, 8)
PAIRS: list[tuple[int, Activations]] = [(bits, activations) for activations in ACTIVATIONS for bits in BITS]
"""Bits of weights, and activations."""
PRECISION = {"int16": 5e-5, "int8": 2e-2, "fp32": 1e-6, "bf16": 5e-3}
"""Of each group's largest activation half a step: 2e-5 of the norm of x, or 5e-3, spread over the outputs; of floats
their rounding."""
AVX2 = (*FLAGS, "-mno-avx512f", "-mno-avxvnni")
NO_VECTORS = (*FLAGS, "-mno-avx")
SHAPES = [(16, 32), (5, 64), (100, 96), (33, 576)]
ROWS = (1, 2, 3, 7, 8, 9, 12, 17, 70)
BY_NAME = {backend.name: backend for backend in BACKENDS}


def ours(flags: tuple[str, ...] = FLAGS) -> LinearKernels:
    found = linear_kernels(flags)
    assert isinstance(found, LinearKernels), found
    return found


def dense(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_gguf(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The weight after the gguf package has quantized it and back."""
    return torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))


def pack(
    weight: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    flags: tuple[str, ...] = FLAGS,
    activations: Activations = "int16",
    group: int = 32,
) -> PackedWeight:
    found = packed(ours(flags), weight, bias, bits, activations, round_group=group)
    assert found is not None
    return found


def weights_of(found: PackedWeight) -> torch.Tensor:
    return found.rows(torch.arange(found.outputs))


# ---- which weights are on a grid


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_1, 4), (Kind.Q4_0, 4), (Kind.Q8_0, 8), (Kind.Q5_0, 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_weights_quantized_by_gguf_are_packed_as_they_are(kind: Kind, bits: int, scale: float) -> None:
    weight = as_gguf(dense(100, 96) * scale, kind)
    found = packed(ours(), weight, None, bits)
    assert found is not None
    assert torch.equal(weights_of(found), weight)


def test_a_grid_whose_ends_are_not_used_is_found() -> None:
    q = torch.randint(3, 12, (32, 64), generator=torch.Generator().manual_seed(0))
    weight = q * torch.tensor(0.0123).half().float() + torch.tensor(-0.101).half().float()
    found = packed(ours(), weight, None, 4)
    assert found is not None
    assert torch.equal(weights_of(found), weight)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("bits", BITS)
def test_equal_weights_are_a_grid(value: float, bits: int) -> None:
    found = packed(ours(), torch.full((3, 32), value), None, bits)
    assert found is not None
    assert torch.equal(weights_of(found), torch.full((3, 32), value))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_weights_are_not_packed(bits: int, dtype: torch.dtype) -> None:
    assert packed(ours(), dense(64, 64).to(dtype).float(), None, bits) is None


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_one_weight_off_the_grid_is_enough(kind: Kind, bits: int) -> None:
    weight = as_gguf(dense(100, 96), kind)
    weight[99, 95] = torch.nextafter(weight[99, 95], torch.tensor(math.inf))
    assert packed(ours(), weight, None, bits) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_packed(bits: int, value: float) -> None:
    weight = dense(16, 32)
    weight[3, 5] = value
    assert (packed(ours(), weight, None, bits), packed(ours(), weight, None, bits, round_group=32)) == (None, None)


@pytest.mark.parametrize("bits", BITS)
def test_inputs_that_are_no_multiple_of_32_are_not_packed(bits: int) -> None:
    assert packed(ours(), torch.zeros(16, 48), None, bits, round_group=32) is None


@pytest.mark.parametrize(("bits", "levels"), [(4, 15), (8, 254)])
@pytest.mark.parametrize("group", [32, 128])
def test_rounded_weights_are_within_half_a_step(bits: int, levels: int, group: int) -> None:
    weight = dense(100, 256)
    groups = weight.view(100, -1, group)
    span = groups.amax(-1) - groups.amin(-1) if bits == 4 else 2 * groups.abs().amax(-1)
    # Half a step, and what rounding scale and offset to fp16 adds.
    error = (weights_of(pack(weight, bits, group=group)) - weight).view(100, -1, group).abs().amax(-1)
    assert bool((error <= span / levels * 0.5 + span * 2.0**-10).all())


@pytest.mark.parametrize(("bits", "levels"), [(4, 16), (8, 255)])
def test_a_group_of_128_has_the_levels_of_one_scale(bits: int, levels: int) -> None:
    found = weights_of(pack(dense(16, 256), bits, group=128)).view(16, 2, 128)
    assert max(len(group.unique()) for row in found for group in row) <= levels


@pytest.mark.parametrize("bits", BITS)
def test_the_last_inputs_may_be_less_than_a_group(bits: int) -> None:
    weight = dense(16, 160)
    tail = weights_of(pack(weight[:, 128:], bits, group=128))
    assert torch.equal(weights_of(pack(weight, bits, group=128))[:, 128:], tail)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_1, 4), (Kind.Q8_0, 8)])
def test_weights_on_a_grid_are_not_rounded_to_a_coarser_one(kind: Kind, bits: int) -> None:
    weight = as_gguf(dense(100, 256), kind)
    assert torch.equal(weights_of(pack(weight, bits, group=128)), weight)


# ---- integers with zero points, as GPTQ, AWQ and compressed-tensors have them


def affine(levels: int, zero: int | None, *, group: int, scales: torch.dtype = torch.float16) -> torch.Tensor:
    """s (q - z), [48, 256], with q of so many levels and each group's own s and, without `zero`, z."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, levels, (48, 256 // group, group), generator=generator)
    z = torch.randint(0, levels, (48, 256 // group, 1), generator=generator) if zero is None else zero
    s = (torch.rand(48, 256 // group, 1, generator=generator) * 0.01 + 1e-3).to(scales).float()
    return (s * (q - z)).view(48, 256)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("zero", [8, None])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
def test_4_bit_integers_are_packed_as_they_are(group: int, zero: int | None, scales: torch.dtype) -> None:
    weight = affine(16, zero, group=group, scales=scales)
    found = packed(ours(), weight, None, 4)
    assert found is not None
    assert torch.equal(weights_of(found), weight)


@pytest.mark.parametrize("group", [32, 128])
def test_8_bit_integers_around_0_are_packed_as_they_are(group: int) -> None:
    weight = affine(256, 128, group=group)
    found = packed(ours(), weight, None, 8)
    assert found is not None
    assert torch.equal(weights_of(found), weight)


@pytest.mark.parametrize("q", [-3, 0, 11])
def test_equal_weights_at_a_zero_point_are_packed_as_they_are(q: int) -> None:
    weight = affine(16, None, group=32)
    weight[5, 32:64] = q * torch.tensor(0.0123).half().float()
    found = packed(ours(), weight, None, 4)
    assert found is not None
    assert torch.equal(weights_of(found), weight)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("flags", [FLAGS, AVX2])
def test_the_product_over_zero_points_is_that_of_its_weights(activations: Activations, flags: tuple[str, ...]) -> None:
    weight, x = affine(16, None, group=64), dense(9, 256)
    expected = x.double() @ weight.double().T
    bound = PRECISION[activations] * x.norm(dim=1).max() * weight.norm(dim=1).max()
    assert float((pack(weight, 4, None, flags, activations)(x) - expected).abs().max()) < float(bound)


def test_activations_left_alone_are_nearer_than_16_bits() -> None:
    weight, x = as_gguf(dense(64, 512), Kind.Q4_1), dense(9, 512, seed=1)
    expected = x.double() @ weight.double().T
    away = {each: float((pack(weight, 4, activations=each)(x) - expected).norm()) for each in ACTIVATIONS}
    assert away["fp32"] < away["int16"] < away["bf16"] < away["int8"]


def test_bf16_activations_are_those_torch_rounds_to() -> None:
    x = dense(9, 96)
    rounded = pack(dense(16, 96), 4, activations="fp32")(x.bfloat16().float())
    assert torch.equal(pack(dense(16, 96), 4, activations="bf16")(x), rounded)


def test_four_bits_hold_a_weight_in_five() -> None:
    assert pack(torch.zeros(160, 320), 4).nbytes == 160 * 320 * 5 // 8


# ---- the products


@pytest.mark.parametrize(("bits", "activations"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("flags", [FLAGS, AVX2])
def test_the_product_is_that_of_its_weights(
    bits: int, activations: Activations, shape: tuple[int, int], rows: int, flags: tuple[str, ...]
) -> None:
    bias, x = dense(shape[0], seed=1), dense(rows, shape[1], seed=2)
    found = pack(dense(*shape), bits, bias, flags, activations)
    expected = x.double() @ weights_of(found).double().T + bias.double()
    bound = PRECISION[activations] * x.norm(dim=1).max() * weights_of(found).norm(dim=1).max()
    assert float((found(x).double() - expected).abs().max()) < float(bound)


@pytest.mark.parametrize(("bits", "activations"), [pair for pair in PAIRS if pair != (8, "int8")])
def test_avx2_gives_the_same_bits(bits: int, activations: Activations) -> None:
    weight, x = dense(100, 576), dense(9, 576, seed=1)
    ours_here = pack(weight, bits, activations=activations)
    assert torch.equal(pack(weight, bits, flags=AVX2, activations=activations)(x), ours_here(x))


def test_without_instructions_for_bytes_activations_of_8_bit_weights_keep_16() -> None:
    weight, x = dense(100, 576), dense(9, 576, seed=1)
    assert torch.equal(pack(weight, 8, flags=AVX2, activations="int8")(x), pack(weight, 8, flags=AVX2)(x))


@pytest.mark.parametrize(("bits", "activations"), PAIRS)
@pytest.mark.parametrize("flags", [FLAGS, AVX2])
def test_a_rows_bits_do_not_depend_on_its_batch(bits: int, activations: Activations, flags: tuple[str, ...]) -> None:
    product, x = pack(dense(100, 96), bits, flags=flags, activations=activations), dense(70, 96, seed=1)
    together = product(x)
    for begin in (0, 1, 5, 63):
        for count in range(1, 8):
            assert torch.equal(product(x[begin : begin + count]), together[begin : begin + count])


@pytest.mark.parametrize(("bits", "activations"), PAIRS)
def test_threads_do_not_change_the_bits(bits: int, activations: Activations) -> None:
    product, x = pack(dense(100, 96), bits, activations=activations), dense(70, 96, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(product(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("bits", "activations"), PAIRS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_activation_that_is_not_finite_spoils_its_row_and_no_other(
    bits: int, activations: Activations, value: float
) -> None:
    product, x = pack(dense(16, 64), bits, activations=activations), dense(3, 64, seed=1)
    clean = product(x)
    x[1, 40] = value
    spoilt = product(x)
    assert not bool(spoilt[1].isfinite().any())
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20])
def test_activations_of_any_size_are_multiplied(bits: int, size: float) -> None:
    product, x = pack(dense(16, 64), bits), dense(3, 64, seed=1)
    expected = x.double() * size @ weights_of(product).double().T
    # Below 1e-30 an activation counts as 0.
    assert float((product(x * size) - expected).abs().max()) < 1e-3 * size + 1e-28


def test_leading_dimensions_stay() -> None:
    assert pack(dense(16, 32), 4)(torch.zeros(2, 3, 32)).shape == (2, 3, 16)


def test_rows_in_steps_are_read_as_they_are() -> None:
    product, x = pack(dense(16, 32), 4), dense(6, 64, seed=1)
    assert torch.equal(product(x[::2, 32:]), product(x[::2, 32:].clone()))


@pytest.mark.parametrize("x", [torch.zeros(2, 16), torch.zeros(2, 32, dtype=torch.float16)])
def test_other_inputs_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="32 float32 inputs"):
        pack(dense(16, 32), 4)(x)


@pytest.mark.parametrize("row", [-1, 16])
def test_a_row_that_is_not_there_is_refused(row: int) -> None:
    with pytest.raises(IndexError):
        pack(dense(16, 32), 4).rows(torch.tensor([0, row]))


def test_kernels_that_a_compiler_got_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "__call__", lambda self, x: torch.zeros(len(x), self.outputs))
    assert "wrong" in str(linear_kernels.__wrapped__())


def test_without_the_instructions_there_are_no_kernels() -> None:
    assert linear_kernels(NO_VECTORS) == "the CPU has neither AVX-512 nor AVX2"


# ---- backends


def test_bfloat16_weights_are_kept_in_fp16() -> None:
    weight = (dense(64, 64) * torch.logspace(-12, 0, 64)).bfloat16().float()
    product = BY_NAME["fbgemm_fp16"].keep(weight, None)
    assert product is not None
    assert float((product(torch.eye(64)) - weight.T).abs().max()) <= 2.0**-25


@pytest.mark.parametrize("value", [1.0 + 2.0**-11, 65520.0, 1e30, math.nan])
def test_a_weight_that_fp16_would_change_is_not_kept_in_it(value: float) -> None:
    weight = torch.zeros(3, 32)
    weight[2, 31] = value
    assert BY_NAME["fbgemm_fp16"].keep(weight, None) is None


@pytest.mark.parametrize("name", BY_NAME)
def test_a_named_backend_takes_any_weight_roughly(name: str) -> None:
    if (why := BY_NAME[name].missing()) is not None:
        pytest.skip(why)
    weight, bias, x = dense(48, 64), dense(48, seed=1), dense(5, 64, seed=2)
    product = BY_NAME[name].round(weight, bias)
    expected = x @ weight.T + bias
    assert product is not None
    assert float((product(x) - expected).norm() / expected.norm()) < {"int4": 0.1}.get(name, 0.01)


def test_a_named_backend_leaves_what_it_cannot_hold_to_the_others() -> None:
    packer = Packer(LinearBackends((BY_NAME["torch"],), BY_NAME["int4"]))
    packer(dense(16, 32), None)
    packer(dense(16, 48), None)
    assert (packer.taken, packer.reason) == ("int4 x1, torch x1", "as configured")


@pytest.mark.parametrize(("kind", "taken"), [("dense", "int8"), ("q4_1", "int4")])
def test_the_head_has_8_bits_unless_4_keep_it(kind: str, taken: str) -> None:
    packer = Packer(LinearBackends(KEEPING, BY_NAME["int4"], head=BY_NAME["int8"]))
    packer.head(MADE[kind](0), None)
    assert packer.taken == taken


def test_layers_of_4_bits_go_with_a_head_of_8() -> None:
    found = resolve_backends(EngineSettings(device="cpu", weight_dtype="int4", group_size=128)).linears
    assert found is not None and isinstance(found.head, Packed)
    assert (found.head.bits, found.head.group_size) == (8, 128)


def test_a_backend_that_does_not_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "linear_kernels", lambda: "no compiler")
    with pytest.raises(ConfigError, match="int4 does not run here: no compiler"):
        resolve_backends(EngineSettings(device="cpu", weight_dtype="int4"))


def test_where_our_kernels_do_not_run_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "linear_kernels", lambda: "no compiler")
    found = resolve_backends(EngineSettings(device="cpu")).linears
    assert found is not None
    assert {backend.name for backend in found.keeping} == {"torch", "fbgemm_fp16"}


def test_a_cpu_backend_is_refused_where_activations_are_not_float32() -> None:
    with pytest.raises(ConfigError, match="float32 activations"):
        resolve_backends(EngineSettings(device="cpu", dtype="bfloat16", linear_backend="fbgemm_fp16"))


@pytest.mark.parametrize(("field", "value"), [("compute_dtype", "int8"), ("weight_dtype", "int4")])
@pytest.mark.parametrize(
    "without", [{"dtype": "bfloat16"}, {"quantization": "bitsandbytes_4bit"}, {"device_map": "auto"}]
)
def test_what_only_our_products_know_is_refused_without_them(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str, without: dict[str, Any]
) -> None:
    asked = without.get("quantization")
    monkeypatch.setattr(backends, "library_quantization", lambda each, _: LibraryQuantization(each) if asked else None)
    with pytest.raises(ConfigError, match=f"{field}: {value} needs a CPU and float32") as refused:
        resolve_backends(EngineSettings(device="cpu", **{field: value}, **without))
    assert refused.value.param == f"engine.{field}"


def test_two_ways_to_round_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set engine\.linear_backend: auto"):
        resolve_backends(EngineSettings(device="cpu", weight_dtype="int4", linear_backend="bf16"))


def test_a_group_size_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set engine\.weight_dtype") as refused:
        resolve_backends(EngineSettings(device="cpu", group_size=128))
    assert refused.value.param == "engine.group_size"


def test_groups_are_those_of_the_settings() -> None:
    found = resolve_backends(EngineSettings(device="cpu", weight_dtype="int4", group_size=128)).linears
    assert found is not None and isinstance(found.rounding, Packed)
    assert (found.rounding.bits, found.rounding.group_size) == (4, 128)


@pytest.mark.parametrize(
    ("compute_dtype", "distilled", "activations"),
    [("auto", False, "int16"), ("auto", True, "int8"), ("int16", True, "int16"), ("fp32", True, "fp32")],
)
def test_only_a_distilled_draft_has_activations_of_8_bits_unasked(
    compute_dtype: ComputeDtype, distilled: bool, activations: Activations
) -> None:
    found = resolve_backends(EngineSettings(device="cpu", compute_dtype=compute_dtype), distilled=distilled).linears
    assert found is not None
    assert {each.activations for each in found.keeping if isinstance(each, Packed)} == {activations}


# ---- the choice


def times_in_order(*names: str) -> products.Measure:
    """Times as if the backends were faster the earlier they are named."""

    def measure(kept: Mapping[str, Product], _: int) -> Mapping[str, Times]:
        return {name: dict.fromkeys(REQUEST, 1.0 + names.index(name)) for name in kept}

    return measure


def in_both_grids(rows: int, inputs: int, *, seed: int) -> torch.Tensor:
    """Weights that int8 and fp16 keep: the scale of each group is a power of two."""
    q = torch.randint(-127, 128, (rows, inputs), generator=torch.Generator().manual_seed(seed))
    q[:, ::32] = 127
    return q / 4096


MADE = {
    "dense": lambda n: dense(16, 64, seed=n),
    "half": lambda n: dense(16, 64, seed=n).half().float(),
    "bfloat16": lambda n: dense(16, 64, seed=n).bfloat16().float(),
    "q4_0": lambda n: as_gguf(dense(16, 64, seed=n), Kind.Q4_0),
    "q4_1": lambda n: as_gguf(dense(16, 64, seed=n), Kind.Q4_1),
    "q8_0": lambda n: as_gguf(dense(16, 64, seed=n), Kind.Q8_0),
    "q8_0 and half": lambda n: in_both_grids(16, 64, seed=n),
}


@settings(max_examples=60)
@given(st.sampled_from(sorted(MADE)), st.integers(0, 100), st.permutations([backend.name for backend in KEEPING]))
def test_however_the_race_ends_the_weights_are_kept(kind: str, seed: int, order: list[str]) -> None:
    weight = MADE[kind](seed)
    product = Packer(LinearBackends(KEEPING), times_in_order(*order))(weight.clone(), None)
    # A product with the identity reads the weights: 16 bits of a 1 are a 1.
    assert float((product(torch.eye(64)).T - weight).abs().max()) <= 2.0**-25


@pytest.mark.parametrize(
    ("kind", "taken"),
    [("dense", "torch"), ("half", "fbgemm_fp16"), ("bfloat16", "fbgemm_fp16"), ("q4_1", "int4"), ("q8_0", "int8")],
)
def test_the_smallest_wins_where_it_is_fastest(kind: str, taken: str) -> None:
    packer = Packer(LinearBackends(KEEPING), times_in_order("int4", "int8", "fbgemm_fp16", "torch"))
    packer(MADE[kind](0), None)
    assert packer.taken == taken


def test_integers_of_4_bits_are_not_kept_in_8() -> None:
    packer = Packer(LinearBackends(KEEPING), times_in_order("int8", "int4", "fbgemm_fp16", "torch"))
    packer(affine(16, 8, group=32), None)
    assert packer.taken == "int4"


def test_a_shape_is_measured_once() -> None:
    measurements = []

    def measure(kept: Mapping[str, Product], inputs: int) -> Mapping[str, Times]:
        measurements.append((sorted(kept), inputs))
        return times_in_order("fbgemm_fp16", "int8")(kept, inputs)

    packer = Packer(LinearBackends(KEEPING), measure)
    for n in range(3):
        packer(MADE["q8_0 and half"](n), None)
    assert measurements == [(["fbgemm_fp16", "int8"], 64)]


def test_the_reason_has_the_times() -> None:
    packer = Packer(LinearBackends(KEEPING), times_in_order("fbgemm_fp16", "int8"))
    packer(MADE["q8_0 and half"](0), None)
    reason = "fastest that keeps the weights: on one thread 1/6 rows take 1000.0/1000.0 ms (int8 2000.0/2000.0)"
    assert packer.reason == reason


def test_every_product_is_measured_at_every_number_of_rows() -> None:
    found = measured({"a": lambda x: x, "b": lambda x: x + 1}, 32)
    assert {name: set(times) for name, times in found.items()} == {"a": set(REQUEST), "b": set(REQUEST)}
    assert all(0 < seconds < math.inf for times in found.values() for seconds in times.values())


def test_measuring_leaves_the_threads_as_they_were() -> None:
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        measured({"a": lambda x: (seen.add(torch.get_num_threads()), x)[1]}, 32)
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


# ---- in a model


@pytest.fixture(scope="module")
def on_grids() -> tiny.LlamaForCausalLM:
    """A model whose layers are Q4_1 and whose tied embedding is Q8_0."""
    model = tiny.tiny_llama(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.copy_(
                as_gguf(parameter.detach(), Kind.Q8_0 if "embed" in name or "lm_head" in name else Kind.Q4_1)
            )
    return model


def smallest() -> Packer:
    return Packer(LinearBackends(KEEPING), times_in_order("int4", "int8", "fbgemm_fp16", "torch"))


def test_packed_weights_change_no_token(on_grids: tiny.LlamaForCausalLM) -> None:
    found = kernels()
    assert isinstance(found, Kernels)
    packer = smallest()
    engine = tiny.engine_for(on_grids, runner=lean_runner(on_grids, found, packer))
    prompt = tiny.prompt(40)
    assert tiny.run(engine, tiny.request(prompt, ignore_eos=True))["r"] == tiny.generate(on_grids, prompt)
    assert packer.taken == "int4 x12, int8 x1"


def test_an_embedding_tied_to_a_packed_head_is_looked_up_there(on_grids: tiny.LlamaForCausalLM) -> None:
    found = kernels()
    assert isinstance(found, Kernels)
    runner = lean_runner(on_grids, found, smallest())
    assert runner._embedding is runner._head


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_head_that_is_rounded_only_a_tied_embedding_is_looked_up_there(tied: bool) -> None:
    found, model = kernels(), tiny.tiny_llama(hidden_size=96, tie_word_embeddings=tied)
    assert isinstance(found, Kernels)
    packer = Packer(LinearBackends(KEEPING, BY_NAME["int4"], head=BY_NAME["int8"]))
    runner = lean_runner(model, found, packer, packer.head, rounds=True)
    assert (runner._embedding is runner._head) == tied


def test_an_embedding_of_its_own_is_not(on_grids: tiny.LlamaForCausalLM) -> None:
    found, model = kernels(), copy.deepcopy(on_grids)
    assert isinstance(found, Kernels)
    model.model.embed_tokens.weight[7, 3] += 1.0
    runner = lean_runner(model, found, smallest())
    assert torch.equal(_rows(runner._embedding, torch.arange(tiny.VOCAB)), model.model.embed_tokens.weight)


def test_a_models_own_code_runs_over_the_chosen_products(on_grids: tiny.LlamaForCausalLM) -> None:
    model, ids = copy.deepcopy(on_grids), torch.tensor([tiny.prompt(9)])
    packer = smallest()
    assert replace_linears(model, packer) == 22
    assert packer.taken == "int4 x21, int8 x1"
    torch.testing.assert_close(model(ids).logits, on_grids(ids).logits, rtol=0, atol=5e-3)
