"""Fixtures shared by every folder of tests."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before anybody imports Triton, as several libraries do: its kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from paceline.models import ModelFiles, resolve

# The same examples in every run and no time limit on one, so that a busy machine fails nothing.
# To search for new ones: pytest --hypothesis-profile default
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The catalogue's small model, in the user's own cache: fetched by the first run ever, 273 MB."""
    return resolve("smollm2-135m")
