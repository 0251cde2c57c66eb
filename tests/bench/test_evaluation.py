"""What rounding may cost the real small model."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.bench.evaluation import Reading, Reference, compare_on_text, load_candidate
from paceline.bench.text import language_reference
from paceline.config import EngineSettings
from paceline.models import ModelFiles


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most"),
    [({"weight_dtype": "int8"}, 0.01), ({"weight_dtype": "int4"}, 0.08), ({"kv_dtype": "int8"}, 0.01)],
)
def test_the_growth_of_perplexity_is_bounded(smollm2: ModelFiles, settings: dict[str, Any], most: float) -> None:
    candidate = load_candidate(smollm2.path, EngineSettings(device="cpu", **settings), context=1024)
    reading = Reading(language_reference(), tokens=8192, context=1024, stride=512)
    assert compare_on_text(candidate, Reference(smollm2.path, None), reading).change.value < most
