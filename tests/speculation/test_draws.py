"""The kernel that draws on a CPU: token for token what torch draws, or no answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.speculation import coupling, draws
from paceline.speculation.draws import UNDECIDED, DrawKernel
from paceline.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(seed=3, temperature=0.8)
WAYS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "top-p": SamplingParams(seed=3, temperature=0.8, top_p=0.95),
    "top-k": SamplingParams(seed=3, temperature=0.8, top_k=50),
    "min-p": SamplingParams(seed=3, temperature=0.8, min_p=0.05),
    "all filters": SamplingParams(seed=3, temperature=0.8, top_p=0.95, top_k=50, min_p=0.05),
}
each_way = pytest.mark.parametrize("params", WAYS.values(), ids=WAYS)
HALVES = torch.tensor([[0.0, 0.0, -1e-6, -1e-6]])

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-5, 0.01, 0.3, 0.8, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 600, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.01, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 1.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
)
WIDTHS = st.sampled_from([1, 2, 7, 63, 64, 65, 127, 128, 1000, 4099])


def kernel() -> DrawKernel:
    found = coupling.kernel()
    assert isinstance(found, DrawKernel), found
    return found


def noise(rows: int, width: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def found(
    logits: torch.Tensor, params: Sequence[SamplingParams], first: int = 0, ids: torch.Tensor | None = None
) -> list[int]:
    """What the kernel itself says, rows at consecutive positions."""
    counters = [0 if p.greedy else coupling._start(p.seed or 0, first + n) for n, p in enumerate(params)]
    columns, decided = kernel().draw(logits, params, counters, ids)
    assert decided == (UNDECIDED not in columns.tolist())
    return list(columns.tolist())


def defined(
    logits: torch.Tensor, params: Sequence[SamplingParams], first: int = 0, ids: torch.Tensor | None = None
) -> list[int]:
    positions = range(first, first + len(params))
    return list(coupling.columns_by_definition(logits, params, positions, ids).tolist())


@pytest.fixture
def fresh() -> Iterator[None]:
    """No kernel remembered from before, and none left behind."""
    coupling.kernel.cache_clear()
    yield
    coupling.kernel.cache_clear()


@given(
    params=st.lists(PARAMS, min_size=1, max_size=6),
    width=WIDTHS,
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 30.0, 1e4]),
    hidden=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
    offset=st.sampled_from([0.0, -1e5, 1e5]),
    seed=st.integers(0, 2**31),
)
def test_rows_draw_what_is_defined_wherever_the_kernel_decides(
    params: list[SamplingParams], width: int, spread: float, hidden: float, offset: float, seed: int
) -> None:
    logits = noise(len(params), width, seed, spread) + offset
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < hidden] = -torch.inf
    pairs = zip(found(logits, params, seed), defined(logits, params, seed), strict=True)
    assert [(a, b) for a, b in pairs if a not in (b, UNDECIDED)] == []


@each_way
@pytest.mark.parametrize("width", [1000, 49_152])
def test_the_kernel_decides_hundreds_of_rows_as_defined(params: SamplingParams, width: int) -> None:
    logits = noise(512_000 // width + 8, width)
    assert found(logits, [params] * len(logits)) == defined(logits, [params] * len(logits))


@each_way
def test_columns_have_the_noise_of_their_ids(params: SamplingParams) -> None:
    logits, ids = (
        noise(100, 999),
        torch.randperm(49_152, generator=torch.Generator().manual_seed(1))[:999].sort().values,
    )
    assert found(logits, [params] * 100, ids=ids) == defined(logits, [params] * 100, ids=ids)


@each_way
def test_logits_in_ascending_order_draw_what_is_defined(params: SamplingParams) -> None:
    logits = noise(20, 5000).sort(dim=-1).values
    assert found(logits, [params] * 20) == defined(logits, [params] * 20)


@each_way
def test_rows_that_lie_apart_are_drawn_in_place(params: SamplingParams) -> None:
    logits = noise(20, 1000)[::3, 100:900]
    assert found(logits, [params] * 7) == defined(logits, [params] * 7)


@each_way
def test_threads_change_nothing(params: SamplingParams) -> None:
    logits, threads = noise(50, 1000), torch.get_num_threads()
    alone = found(logits, [params] * 50)
    torch.set_num_threads(3)
    try:
        assert found(logits, [params] * 50) == alone
    finally:
        torch.set_num_threads(threads)


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [70, 71, 299]] = 1.0
    assert found(logits, [GREEDY]) == [70]


@each_way
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 290])
def test_a_row_that_is_no_distribution_draws_what_is_defined(params: SamplingParams, broken: float, place: int) -> None:
    logits = noise(1, 300)
    logits[0, place] = broken
    assert coupling.draw_rows(logits, [params], [5]).tolist() == defined(logits, [params], 5)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_row_where_nothing_is_possible_draws_what_is_defined(params: SamplingParams) -> None:
    logits = torch.full((1, 300), -torch.inf)
    assert coupling.draw_rows(logits, [params], [5]).tolist() == defined(logits, [params], 5)


def test_the_edge_of_a_nucleus_that_rounding_decides_is_left_open() -> None:
    """The likeliest two of four tokens have half of the mass, and a quarter of a millionth more."""
    logits, params = HALVES.repeat(200, 1), [SamplingParams(seed=seed, top_p=0.5) for seed in range(200)]
    assert set(found(logits, params)) == {0, 1, UNDECIDED}


def test_what_the_kernel_leaves_open_is_drawn_as_defined() -> None:
    logits, params = HALVES.repeat(200, 1), [SamplingParams(seed=seed, top_p=0.5) for seed in range(200)]
    assert coupling.draw_rows(logits, params, range(200)).tolist() == defined(logits, params)


@each_way
def test_half_precision_is_drawn_as_defined(params: SamplingParams) -> None:
    logits = noise(20, 300).bfloat16()
    assert coupling.draw_rows(logits, [params] * 20, range(20)).tolist() == defined(logits, [params] * 20)


def test_an_empty_batch_draws_nothing() -> None:
    assert coupling.draw_rows(torch.empty(0, 300), [], []).tolist() == []


def test_without_a_compiler_rows_are_drawn_as_defined(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    logits = noise(20, 300)
    assert coupling.draw_rows(logits, [SEEDED] * 20, range(20)).tolist() == defined(logits, [SEEDED] * 20)
    assert "no C++ compiler" in str(coupling.kernel())


def test_a_kernel_that_draws_wrong_is_not_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(DrawKernel):
        def draw(self, *given: object) -> tuple[torch.Tensor, bool]:
            columns, decided = super().draw(*given)  # type: ignore[arg-type]
            return columns ^ 1, decided

    right = draws.build()
    assert isinstance(right, DrawKernel)
    monkeypatch.setattr(draws, "build", lambda: Wrong(right.library))
    assert coupling.kernel() == "this compiler builds it wrong"
