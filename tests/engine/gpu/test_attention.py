"""Our attention kernel over blocks, against attention spelled out."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which also interprets its kernels on a CPU, is not installed")

from paceline.engine.gpu import attention
from paceline.engine.gpu.attention import PagedAttention, Plan
from tests.engine.gpu.paged import Case, difference

# Of a window's rows some are nobody's: what they come to is not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")

LAYER = 1
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SHORT = [(37, 1), (0, 1), (20, 5), (16, 2)]
LONG = [(100, 40), (3, 1), (0, 50)]


def attended(case: Case, name: str = "triton") -> torch.Tensor:
    """One layer, whose rows are parts of wider ones, as those of fused products are."""
    found = PagedAttention(name, torch.device(case.device))
    q, k, v = torch.cat([case.q, case.k, case.v], dim=1).split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    batch, layout = case.batch(), case.layout
    if not case.sloped:
        return found.attend(batch, LAYER, layout, case.scoring, q, k, v)
    out = torch.empty((case.rows, case.heads * case.dim), dtype=case.dtype, device=case.device)
    found._launch(batch, LAYER, layout, case.scoring, q, k, v, out, slopes=case.slopes)
    return out


def worst(case: Case) -> float:
    """Of the rows, and of all that lies in blocks thereafter."""
    out, keys, values = case.expected(LAYER)
    pairs = [(attended(case), out), (case.keys, keys), (case.values, values)]
    return max(difference(found, expected) for found, expected in pairs)


def forced(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Launches of another shape than the one chosen."""
    of = Plan.of
    monkeypatch.setattr(attention.Plan, "of", lambda *args: replace(of(*args), **changes))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(3, 3, 16), (4, 2, 64), (4, 1, 80), (9, 3, 20)], ids=["MHA", "GQA", "MQA", "odd"]
)
def test_heads_of_any_kind(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert worst(Case(SHORT, heads, kv_heads, dim, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "asked",
    [
        {"sliding": 20},
        {"sliding": 1},
        {"softcap": 3.0},
        {"sloped": True},
        {"sunk": True},
        {"turned": True},
        {"normed": True},
        {"turned": True, "normed": True, "sliding": 9, "softcap": 5.0, "sunk": True, "sloped": True},
    ],
    ids=lambda asked: " ".join(asked),
)
def test_what_is_asked_of_scores_and_rows(asked: dict[str, Any]) -> None:
    assert worst(Case(SHORT, **asked)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("sliding", [None, 33])
def test_tokens_split_among_programs(monkeypatch: pytest.MonkeyPatch, split: int, sliding: int | None) -> None:
    forced(monkeypatch, split=split)
    assert worst(Case([(150, 1), (3, 4), (0, 1)], kv_heads=1, sliding=sliding, sunk=True)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("sliding", [None, 7])
def test_windows_of_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch, sliding: int | None) -> None:
    forced(monkeypatch, rows=16, row_tiles=7, split=2, new=16)
    assert worst(Case(LONG, kv_heads=2, sliding=sliding)) < TOLERANCE[torch.float32]


def test_the_plan_has_programs_for_all_rows() -> None:
    for longest in range(1, 200):
        plan = Plan.of(3, longest, Case([(0, longest)], 8, 2).layout, 64, 132)
        assert plan.rows * plan.row_tiles >= longest * 4


@pytest.mark.parametrize("seed", range(6))
def test_any_ragged_batch(seed: int) -> None:
    chance = random.Random(seed)
    windows = [
        (chance.choice([0, chance.randrange(70)]), chance.randrange(1, 20)) for _ in range(chance.randrange(1, 5))
    ]
    case = Case(
        windows,
        *chance.choice([(2, 2), (6, 2), (8, 1)]),
        dim=chance.choice([16, 24]),
        block=chance.choice([16, 32]),
        turned=chance.random() < 0.5,
        sliding=chance.choice([None, 5, 30]),
        softcap=chance.choice([None, 4.0]),
        sunk=chance.random() < 0.5,
        seed=seed,
    )
    assert worst(case) < TOLERANCE[torch.float32]


def test_windows_that_are_not_there_change_nothing() -> None:
    """A graph's: fewer sequences come than it has room for."""
    case = Case([(20, 2), (9, 1)])
    batch = case.batch()
    lengths = torch.tensor([2, 0], dtype=torch.int32)
    found = PagedAttention("triton", torch.device("cpu"))
    found.attend(replace(batch, lengths=lengths), LAYER, case.layout, case.scoring, case.q, case.k, case.v)
    missing = case.batch().slots[2]
    assert torch.equal(case.keys[:, missing], case.before[0][:, missing])


def test_memory_of_one_launch_serves_the_next() -> None:
    """Counters are zero again, and partial sums of a larger launch leave nothing behind."""
    found = PagedAttention("triton", torch.device("cpu"))
    for windows in ([(60, 2), (40, 1), (50, 3)], [(45, 1)], [(60, 2), (40, 1), (50, 3)]):
        case = Case(windows)
        out = found.attend(case.batch(), LAYER, case.layout, case.scoring, case.q, case.k, case.v)
        assert difference(out, case.expected(LAYER)[0]) < TOLERANCE[torch.float32]
