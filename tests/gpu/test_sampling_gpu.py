"""Drawing and verifying on a GPU: the tokens a CPU gives for the same logits."""

from __future__ import annotations

import pytest
import torch

from paceline.speculation import coupling, rejection
from paceline.speculation.rejection import Guess
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams

pytestmark = pytest.mark.gpu

VOCAB = 5000
PARAMS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.9),
    SamplingParams(temperature=0),
    SamplingParams(seed=3, top_k=40, top_p=0.8),
    SamplingParams(seed=4, min_p=0.02, temperature=0.7),
]


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3


def test_a_mixed_batch_draws_what_a_cpu_draws() -> None:
    params, positions = PARAMS * 20, list(range(100))
    expected = coupling.draw_rows(logits(100), params, positions)
    assert torch.equal(coupling.draw_rows(logits(100).cuda(), params, positions).cpu(), expected)


def test_drafts_and_verdicts_of_rejection_are_a_cpus() -> None:
    drafting = [Rows(params, 1, [0]) for params in PARAMS]
    drafted = {where: rejection.draft(logits(5).to(where), drafting) for where in ("cpu", "cuda")}
    assert [token for token, _ in drafted["cuda"]] == [token for token, _ in drafted["cpu"]]
    guesses = [Guess((token,), (row,)) for token, row in drafted["cpu"]]
    batch = [Rows(params, 1, [0], guess.tokens, 2) for params, guess in zip(PARAMS, guesses, strict=True)]
    assert rejection.verify(logits(10).cuda(), batch, guesses) == rejection.verify(logits(10), batch, guesses)
