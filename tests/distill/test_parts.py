"""Muon, the loss, budgets, shapes, acceptance and what a draft is worth."""

from __future__ import annotations

import pytest
import torch

from paceline.distill.budget import Budget
from paceline.distill.draft import choose_tokens
from paceline.distill.measure import steps, summarize
from paceline.distill.muon import Muon, orthogonal
from paceline.distill.plan import Costs, best, choose, expected_tokens, gains
from paceline.distill.shape import PRESETS, DraftShape, parse_size
from paceline.distill.train import TrainSettings, distillation_loss
from paceline.errors import ConfigError


@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 40, 24)])
def test_orthogonal_has_singular_values_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3


def test_muon_descends() -> None:
    goal = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([matrix], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (matrix - goal).square().sum().backward()
        optimizer.step()
    assert float((matrix.detach() - goal).square().mean()) < 0.1 * float(goal.square().mean())


def test_the_loss_of_the_same_distribution_is_zero() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    assert float(distillation_loss(logits, logits + 3.0, 0.8, 0.5)) == pytest.approx(0.0, abs=1e-5)


def test_the_learning_rate_rises_holds_and_falls() -> None:
    recipe = TrainSettings(lr=1.0, warmup=0.1, cooldown=0.5)
    assert [recipe.rate(f) for f in (0.05, 0.3, 0.75, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_a_budget_counts_what_an_earlier_run_used() -> None:
    now = iter((100.0, 103.0))
    budget = Budget(10.0, used=5.0, clock=lambda: next(now))
    budget.advance()
    assert budget.fraction == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("agreed", "depth", "expected"),
    [("", 4, 0), ("0", 4, 1), ("1111", 4, 1), ("11110", 4, 1), ("111101", 4, 2), ("1110", 2, 2), ("000", 4, 3)],
)
def test_verification_steps(agreed: str, depth: int, expected: int) -> None:
    assert steps([one == "1" for one in agreed], depth) == expected


def test_a_draft_that_is_always_right_gives_depth_plus_one() -> None:
    assert summarize([[True] * 10]).tokens_per_step[4] == 5.0


def test_acceptance_by_position_counts_those_tried() -> None:
    assert summarize([[True, False, True, True, False]]).by_position[:3] == (1.0, 0.5, 0.0)


def test_expected_tokens_of_independent_acceptance() -> None:
    assert expected_tokens(0.5)[2] == 1.75


def test_the_gain_weighs_the_window_and_the_draft() -> None:
    found = gains({4: 3.0}, Costs({1: 10.0, 5: 12.0}, draft=1.0))
    assert (found[0].speedup, found[0].aside) == pytest.approx((30 / 16, 2.5))


def test_a_dear_draft_is_not_chosen() -> None:
    dear = {"tiny": 0.1, "small": 0.5, "medium": 9.0, "large": 20.0}
    costs = {PRESETS[name].hidden: cost for name, cost in dear.items()}
    name, _ = choose({1: 8.0, 9: 10.0}, lambda shape: costs[shape.hidden], 49152)
    assert name == "small"


def test_depth_one_is_best_when_windows_are_dear() -> None:
    costs = Costs({1: 1.0, 3: 3.0, 9: 9.0}, draft=0.0)
    assert best(gains(expected_tokens(0.6), costs)).depth == 1


def test_the_medium_preset_fits_16_megabytes() -> None:
    assert PRESETS["medium"].bytes < 16e6


def test_a_size_may_be_spelled_out() -> None:
    assert parse_size("kept=100,layers=2") == DraftShape(100, 384, 2, 1024, 2)


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="tiny, small, medium, large"):
        parse_size("huge")


def test_kept_tokens_are_the_frequent_and_the_special_ones() -> None:
    embedding = torch.eye(6)
    tokens = choose_tokens(torch.tensor([0, 9, 1, 8, 0, 2]), 3, [4], embedding)
    assert tokens.kept.tolist() == [1, 3, 4]


def test_another_token_is_read_as_the_kept_one_most_like_it() -> None:
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.9]])
    tokens = choose_tokens(torch.tensor([5, 5, 0, 0]), 2, [], embedding)
    assert tokens.nearest.tolist() == [0, 1, 0, 1]
