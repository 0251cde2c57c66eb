"""The draft that comes with the package, on what its target answered to prompts held out from its training.

That text is kept (tests.distill.continuations), so the draft runs alone here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.config import DEFAULT_DRAFT
from paceline.distill.draft import DraftBody, Tokens
from paceline.distill.measure import Acceptance, agreements, by_category
from paceline.models import ModelFiles, load_tokenizer, resolve, tokenizer_fingerprint
from paceline.models.draft_folder import load_draft, load_tokens, read_card
from tests.distill import continuations


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(DEFAULT_DRAFT).path


def test_it_takes_at_most_16_megabytes(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000


def test_it_speaks_its_targets_ids(folder: Path, smollm2: ModelFiles) -> None:
    assert read_card(folder).fingerprint == tokenizer_fingerprint(load_tokenizer(smollm2.path))


def acceptance_of(folder: Path, temperature: float) -> dict[str, Acceptance]:
    kept, nearest = load_tokens(folder)
    index = torch.full_like(nearest, -1)
    index[kept] = torch.arange(len(kept))
    tokens = Tokens(kept, nearest, index)
    body = DraftBody(load_draft(folder, dtype=torch.float32, device="cpu"), tokens)
    texts = continuations.read(temperature)
    return by_category(texts, agreements(body, tokens, texts))


if __name__ == "__main__":
    import time
    for t in (0.0, 0.8):
        a = time.time()
        for name, one in acceptance_of(resolve(DEFAULT_DRAFT).path, t).items():
            print(t, name, one.continuations, one.tokens, {k: round(v, 3) for k, v in one.tokens_per_step.items()}, round(one.agreement, 4), [round(x, 2) for x in one.by_position])
        print(time.time() - a)
