"""A layer's products and what surrounds them, against the same in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import silu

pytest.importorskip("triton", reason="Triton, which also interprets its kernels on a CPU, is not installed")

from paceline.engine.gpu import kernels, linear
from paceline.engine.gpu.attention import Scratch
from paceline.engine.gpu.linear import Linears, Tiles, Weight
from tests.engine.gpu.paged import difference

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}
ROWS = [5, 16, 21, 40]
OUTPUTS, INPUTS = 70, 100
"""No multiples of any tile."""
LAUNCHES = [Tiles(32, 64, 1, 4, 2), Tiles(64, 32, 1, 4, 2), None]
"""None: by PyTorch's product, with our kernels around it."""
SPLITS = [Tiles(32, 32, 2, 4, 2), Tiles(64, 16, 4, 4, 2)]


class Weights:
    """Some of a model's, and rows of activations; drawn alike for one seed."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        draws = torch.Generator().manual_seed(rows)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draws).to(dtype)

        self.x, self.y, self.residual = random(rows, INPUTS), random(rows, INPUTS), random(rows, OUTPUTS)
        self.weight, self.both = random(OUTPUTS, INPUTS) / 10, random(2 * OUTPUTS, INPUTS) / 10
        self.bias, self.biases, self.norm = random(OUTPUTS), random(2 * OUTPUTS), 1 + random(INPUTS) / 8

    def normed(self) -> torch.Tensor:
        x = self.x.double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.norm.double()


@pytest.fixture(params=[*LAUNCHES, *SPLITS], ids=str)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tiles | None:
    """How products are launched."""
    found: Tiles | None = request.param

    def tiles_for(rows: int, outputs: int, inputs: int, *, gated: bool, normed: bool, in_bytes: bool) -> Tiles | None:
        return found

    monkeypatch.setattr(linear, "tiles_for", tiles_for)
    return found


@pytest.fixture
def linears() -> Linears:
    return Linears(EPS, Scratch(torch.device("cpu")))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_of_normed_rows(tiles: Tiles | None, linears: Linears, biased: bool, dtype: torch.dtype) -> None:
    for rows in ROWS[:2] if tiles in SPLITS else ROWS:
        w = Weights(rows, dtype)
        bias = w.bias if biased else None
        expected = w.normed() @ w.weight.double().T + (bias.double() if biased else 0)
        assert difference(linears.normed(w.x, w.norm, Weight(w.weight, bias)), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tiles", LAUNCHES, ids=str, indirect=True)  # gated products are not split
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_gated_product(tiles: Tiles | None, linears: Linears, biased: bool, dtype: torch.dtype) -> None:
    for rows in ROWS[1:3]:
        w = Weights(rows, dtype)
        bias = w.biases if biased else None
        gates, ups = (w.normed() @ w.both.double().T + (bias.double() if biased else 0)).chunk(2, dim=1)
        assert difference(linears.gated(w.x, w.norm, Weight(w.both, bias)), silu(gates) * ups) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("biased", "scale"), product([False, True], [1.0, 0.5]))
def test_a_product_is_added_in_place(
    tiles: Tiles | None, linears: Linears, biased: bool, scale: float, dtype: torch.dtype
) -> None:
    for rows in ROWS[:2]:
        w = Weights(rows, dtype)
        bias = w.bias if biased else None
        expected = w.residual.double() + scale * (w.y.double() @ w.weight.double().T + (bias.double() if biased else 0))
        assert linears.added(w.residual, w.y, Weight(w.weight, bias), scale) is w.residual
        assert difference(w.residual, expected) < TOLERANCE[dtype]


def test_weights_of_8_bits_are_their_steps_times_their_scales(linears: Linears, tiles: Tiles | None) -> None:
    w = Weights(5, torch.float16)
    rounded = Weight(w.weight).rounded()
    assert rounded.scales is not None
    steps = rounded.data.double() * rounded.scales[:, None].double()
    assert (steps - w.weight.double()).abs().amax(dim=1).le(0.51 * rounded.scales.double()).all()
    expected = w.normed() @ steps.T
    assert difference(linears.normed(w.x, w.norm, rounded), expected) < TOLERANCE[torch.float16]


def test_logits_are_float32_whatever_the_weights_are(tiles: Tiles | None, linears: Linears) -> None:
    w = Weights(3, torch.float16)
    out = torch.empty(3, OUTPUTS)
    linears.normed(w.x, w.norm, Weight(w.weight), out=out)
    assert difference(out, w.normed() @ w.weight.double().T) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_what_is_chosen_for_large_products_takes_all_their_rows(rows: int) -> None:
    """Whatever the shape, a launch has tiles that Triton can make, or there is none."""
    for outputs, inputs in product([256, 4096, 28672, 131072], [1024, 14336]):
        for gated, normed in ((True, True), (False, True), (False, False)):
            found = linear.tiles_for(max(16, rows), outputs, inputs, gated=gated, normed=normed)
            if found is not None:
                assert all(n & (n - 1) == 0 for n in (found.out, found.inputs, found.split))
                assert found.split == 1 or not gated


def test_rows_are_normed_as_llamas_are() -> None:
    w = Weights(4, torch.float32)
    out = torch.empty_like(w.x)
    kernels.norm_rows[(4,)](w.x, w.norm, out, INPUTS, EPS, WIDE=128)
    assert difference(out, w.normed()) < TOLERANCE[torch.float32]


def test_rows_are_gated() -> None:
    gates, ups = torch.randn(2, 3, OUTPUTS, generator=torch.Generator().manual_seed(0))
    out = torch.empty(3, OUTPUTS)
    kernels.gate_rows[(3, 3)](torch.cat([gates, ups], dim=1), out, OUTPUTS, BLOCK=32)
    assert difference(out, silu(gates.double()) * ups.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_heads_are_turned_in_place_and_others_are_not(turned: bool, normed: bool) -> None:
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([7, 0, 2], dtype=torch.int32)
    angles = torch.arange(8)[:, None] * 10_000.0 ** (-torch.arange(0, 20, 2) / 20)
    norm = 1 + torch.randn(20, generator=torch.Generator().manual_seed(1)) / 8
    expected = x.double()
    heads = expected[:, 1:3]
    if normed:
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS) * norm.double()
    if turned:
        cos, sin = (each[positions.long()][:, None].double() for each in (angles.cos(), angles.sin()))
        low, high = heads.chunk(2, dim=-1)
        heads = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    expected[:, 1:3] = heads
    kernels.rotate_rows[(3, 2)](
        x, x.stride(0), positions, angles.cos(), angles.sin(), norm, EPS, 1,
        DIM=20, HALF=16, ROTATES=turned, NORMED=normed,
    )  # fmt: skip
    assert difference(x, expected) < TOLERANCE[torch.float32]


def test_ids_are_the_last_steps_tokens_where_that_is_asked() -> None:
    ids, feeds = torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([-1, 1, 0], dtype=torch.int32)
    out = torch.full((4,), -1, dtype=torch.int32)
    kernels.take_ids[(1,)](ids, feeds, torch.tensor([50, 60]), out, 3, BLOCK=16)
    assert out.tolist() == [5, 60, 50, -1]
