"""Fixtures shared by every folder of tests."""

from __future__ import annotations

import hypothesis
import pytest

from paceline.models import ModelFiles, resolve

# The same examples in every run and no time limit on one, so that a busy machine fails nothing.
# To search for new ones: pytest --hypothesis-profile default
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The catalogue's small model, in the user's own cache: fetched by the first run ever, 273 MB."""
    return resolve("smollm2-135m")
