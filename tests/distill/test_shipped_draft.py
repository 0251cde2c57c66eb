"""The draft that comes with the package, on what its target answered to prompts held out from its training.

That text is kept (tests.distill.continuations), so the draft runs alone here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paceline import LLM
from paceline.config import DEFAULT_DRAFT, DEFAULT_MODEL
from paceline.distill.draft import DraftBody, Tokens
from paceline.distill.measure import Acceptance, agreements, by_category, steps
from paceline.models import ModelFiles, load_tokenizer, resolve, tokenizer_fingerprint
from paceline.models.draft_folder import load_draft, load_tokenizer_text, load_tokens, read_card
from paceline.speculation.grammar import tokenizer_text
from tests.distill import continuations

MADE = {
    0.0: {"chat": 2.818, "questions": 2.335, "code": 3.415, "lists": 2.981, "rewriting": 2.656, "all": 2.830},
    0.8: {"chat": 2.203, "questions": 2.049, "code": 2.650, "lists": 2.311, "rewriting": 2.102, "all": 2.272},
}
"""Tokens committed for each verification step at depth 4, by temperature and category, when the draft was made."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(DEFAULT_DRAFT).path


def test_it_takes_at_most_16_megabytes(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000


def test_it_speaks_its_targets_ids(folder: Path, smollm2: ModelFiles) -> None:
    assert read_card(folder).fingerprint == tokenizer_fingerprint(load_tokenizer(smollm2.path))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tokens:
    kept, nearest = load_tokens(folder)
    index = torch.full_like(nearest, -1)
    index[kept] = torch.arange(len(kept))
    return Tokens(kept, nearest, index)


@pytest.fixture(scope="module")
def body(folder: Path, tokens: Tokens) -> DraftBody:
    return DraftBody(load_draft(folder, dtype=torch.float32, device="cpu"), tokens)


@pytest.fixture(scope="module", params=continuations.TEMPERATURES)
def measured(body: DraftBody, tokens: Tokens, request: pytest.FixtureRequest) -> tuple[float, dict[str, Acceptance]]:
    """The temperature and the figures by category, `all` among them."""
    texts = continuations.read(request.param)
    return request.param, by_category(texts, agreements(body, tokens, texts))


def test_it_is_worth_its_while_at_depth_4(measured: tuple[float, dict[str, Acceptance]]) -> None:
    temperature, found = measured
    assert found["all"].tokens_per_step[4] >= {0.0: 2.3, 0.8: 1.9}[temperature]


def test_no_kind_of_prompt_got_worse(measured: tuple[float, dict[str, Acceptance]]) -> None:
    temperature, found = measured
    worse = {name: rate for name, rate in MADE[temperature].items() if found[name].tokens_per_step[4] < 0.97 * rate}
    assert not worse


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEFAULT_MODEL, DEFAULT_DRAFT, device="cpu", kv_tokens=8192, depth=4)


@pytest.mark.parametrize("temperature", continuations.TEMPERATURES)
def test_an_engine_takes_the_steps_that_were_counted(
    llm: LLM, body: DraftBody, tokens: Tokens, temperature: float
) -> None:
    """Near-ties between two tokens may fall otherwise in the engine's arithmetic: hence not exactly."""
    texts = continuations.read(temperature)[::12]
    outputs = llm.generate([list(text.prompt) for text in texts], [text.params for text in texts])
    metrics = [one.outputs[0].metrics for one in outputs]
    taken = sum(each.steps for each in metrics)
    counted = sum(steps(agreed, 4) for agreed in agreements(body, tokens, texts))
    assert taken == pytest.approx(counted, rel=0.05)


def test_it_compiles_grammars_as_its_target_does(folder: Path, smollm2: ModelFiles) -> None:
    text = load_tokenizer_text(folder)
    target = tokenizer_text(load_tokenizer(smollm2.path))
    assert text is not None and target is not None
    assert json.loads(text) == json.loads(target)
