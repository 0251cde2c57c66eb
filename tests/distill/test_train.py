"""What is remembered of the target, and training where compiling fails."""

from __future__ import annotations

import pytest
import torch

from paceline.distill.budget import Budget
from paceline.distill.draft import DraftBody, choose_tokens, new_draft
from paceline.distill.shape import DraftShape
from paceline.distill.teacher import StateStore, Teacher
from paceline.distill.text import Rows
from paceline.distill.train import Trainer, TrainSettings
from tests.tiny import VOCAB, tiny_llama

CPU = torch.device("cpu")
SHAPE = DraftShape(kept=64, hidden=64, layers=1, mlp=64, kv_heads=1)


@pytest.fixture
def rows() -> Rows:
    tokens = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Rows(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))


def store_of(rows: int) -> StateStore:
    return StateStore(rows, 16, tiny_llama().config.hidden_size, torch.float32, CPU)


def trainer_on(rows: Rows) -> Trainer:
    target = tiny_llama()
    counts = rows.counts(VOCAB)
    tokens = choose_tokens(counts, SHAPE.kept, [], target.get_input_embeddings().weight)
    draft = DraftBody(new_draft(SHAPE, tokens, counts, target, seed=0), tokens)
    return Trainer(draft, Teacher(target, tokens.kept), rows, TrainSettings(batch=4))


def test_states_beyond_the_store_are_computed(rows: Rows) -> None:
    teacher = Teacher(tiny_llama(), torch.arange(VOCAB), store_of(3))
    index = torch.tensor([6, 1, 2])
    teacher.states(torch.tensor([1]), rows.at(torch.tensor([1])))
    expected = teacher.compute(rows.at(index))
    assert torch.allclose(teacher.states(index, rows.at(index)), expected, atol=1e-5)


def test_what_was_computed_is_remembered(rows: Rows) -> None:
    store = store_of(8)
    teacher = Teacher(tiny_llama(), torch.arange(VOCAB), store)
    teacher.states(torch.tensor([4, 7]), rows.at(torch.tensor([4, 7])))
    assert store.get(torch.tensor([4, 5, 7]))[1].tolist() == [True, False, True]


def test_a_store_is_full_when_every_row_is_known(rows: Rows) -> None:
    store = store_of(2)
    store.put(torch.arange(8), Teacher(tiny_llama(), torch.arange(VOCAB)).compute(rows))
    assert store.full


def test_training_goes_on_where_compiling_fails(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    trainer, plain = trainer_on(rows), trainer_on(rows)
    monkeypatch.setattr(trainer, "_compiles", True)
    monkeypatch.setattr(trainer, "_loss", broken)
    assert trainer.run(Budget(2, counts_steps=True)).loss == plain.run(Budget(2, counts_steps=True)).loss
