"""Kernels run in Triton's interpreter here, over tensors of a CPU."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """tests/conftest.py asks for the interpreter where there is no GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles its kernels here, where tests/gpu runs them; TRITON_INTERPRET=1 interprets them")
