"""Our engine's path and the model's own code say the same of a text, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.bench.scorers import EngineScorer, TransformersScorer
from paceline.config import EngineSettings
from paceline.engine.attention import Window
from paceline.engine.load import LoadedModel, load_model
from paceline.errors import ConfigError
from tests import tiny
from tests.bench.folders import write_model

MODEL = tiny.tiny_llama()
IDS = tiny.prompt(60)
REFERENCE = TransformersScorer(MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def loaded(folder: Path, **options: Any) -> LoadedModel:
    return load_model(
        folder, EngineSettings(**{"device": "cpu", "threads": 1, "kv_tokens": 512, "linear_backend": "torch"} | options)
    )


def test_the_models_own_code_gives_the_last_rows() -> None:
    expected = MODEL(input_ids=torch.tensor([IDS])).logits[0, -7:]
    # The head is computed for 7 rows in place of 60: not to the last bit the same product on every number of threads.
    torch.testing.assert_close(REFERENCE.logits(IDS, 7), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 25, 60])
@pytest.mark.parametrize("rows", [None, 1, 6])
def test_the_engine_agrees_however_it_is_cut(folder: Path, count: int, rows: int | None) -> None:
    found = EngineScorer(loaded(folder, max_batched_tokens=16), rows).logits(IDS, count)
    torch.testing.assert_close(found, REFERENCE.logits(IDS, count), atol=1e-4, rtol=1e-4)


def passes(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Fills with tokens and sampled rows of every pass."""
    seen: list[tuple[int, int]] = []
    run = model.runner.run

    def watched(windows: list[Window]) -> torch.Tensor:
        seen.extend((len(window.token_ids), window.sample) for window in windows)
        return run(windows)

    monkeypatch.setattr(model.runner, "run", watched)
    return seen


def test_prompts_go_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder, max_batched_tokens=25)
    seen = passes(model, monkeypatch)
    EngineScorer(model).logits(IDS, 20)
    assert seen == [(25, 0), (25, 10), (10, 10)]


def test_scored_tokens_go_in_verification_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder, max_batched_tokens=25)
    seen = passes(model, monkeypatch)
    EngineScorer(model, rows=6).logits(IDS, 20)
    assert seen == [(25, 0), (15, 0), (6, 6), (6, 6), (6, 6), (2, 2)]


def test_a_beginning_in_the_cache_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder)
    scorer = EngineScorer(model)
    scorer.logits(IDS, 20)
    seen = passes(model, monkeypatch)
    scorer.logits([*IDS[:-1], 5], 20)
    assert seen == [(20, 20)]


def test_a_streaming_window_changes_what_lies_beyond_it(folder: Path) -> None:
    found = EngineScorer(loaded(folder, ctx_size=32)).logits(IDS, 60)
    expected = REFERENCE.logits(IDS, 60)
    differs = (found - expected).abs().amax(dim=1) > 1e-3
    assert differs.tolist() == [n >= 32 for n in range(60)]


def test_quantized_kv_is_near_and_not_equal(folder: Path) -> None:
    found = EngineScorer(loaded(folder, kv_dtype="int8")).logits(IDS, 60)
    worst = float((found - REFERENCE.logits(IDS, 60)).abs().max())
    assert 1e-4 < worst < 1.0


def test_a_text_beyond_the_kv_cache_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_tokens"):
        EngineScorer(loaded(folder, kv_tokens=40)).logits(IDS, 5)


def test_the_kv_account_closes(folder: Path) -> None:
    scorer = EngineScorer(loaded(folder))
    scorer.logits(IDS, 5)
    scorer.kv.check()
    assert scorer.kv.usage().in_use == 0
