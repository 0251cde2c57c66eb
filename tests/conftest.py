"""Fixtures shared by every folder of tests."""

from __future__ import annotations

import pytest

from paceline.models import ModelFiles, resolve


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The catalogue's small model, in the user's own cache: fetched by the first run ever, 273 MB."""
    return resolve("smollm2-135m")
