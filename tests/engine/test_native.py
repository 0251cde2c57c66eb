"""The kernels are compiled for the host, or there is a reason why not; loading them changes nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paceline import native as building
from paceline.engine import native
from paceline.engine.native import Kernels, kernels

SUBNORMAL = """
import numpy
from paceline.engine.native import Kernels, kernels
assert isinstance(kernels(), Kernels)
print((numpy.array([1e-40], dtype=numpy.float32) * numpy.float32(1.0))[0] > 0)
"""


@pytest.fixture
def fresh() -> Iterator[None]:
    """No answer remembered from before, and none left behind."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@pytest.fixture
def empty_cache(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(building, "cache_dir", lambda: tmp_path)
    return tmp_path


def test_the_library_is_built_once(empty_cache: Path) -> None:
    assert isinstance(kernels(), Kernels)
    (built,) = (empty_cache / "kernels").iterdir()
    first = built.stat().st_mtime_ns
    kernels.cache_clear()
    assert isinstance(kernels(), Kernels)
    assert built.stat().st_mtime_ns == first


def test_loading_leaves_subnormal_numbers_alone() -> None:
    """Draft and target must compute alike, whether or not one of them has loaded the kernels."""
    out = subprocess.run([sys.executable, "-c", SUBNORMAL], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"


def test_without_a_compiler_the_reason_is_said(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no C++ compiler" in str(kernels())


def test_a_failing_compiler_is_no_crash(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-this-is-no-flag",))
    assert "failed to compile" in str(kernels())


def test_the_norm_is_torchs() -> None:
    library = kernels()
    assert isinstance(library, Kernels)
    x, y, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    expected = torch.nn.functional.rms_norm(x + 0.5 * y, (33,), weight, 1e-5)
    out = torch.empty_like(x)
    library.library.add_rms_norm(x.data_ptr(), y.data_ptr(), 0.5, weight.data_ptr(), 1e-5, out.data_ptr(), 5, 33)
    torch.testing.assert_close(out, expected)


def test_the_gate_is_torchs() -> None:
    library = kernels()
    assert isinstance(library, Kernels)
    gate_up = torch.randn(5, 2 * 37) * 10
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty(5, 37)
    library.library.silu_mul(gate_up.data_ptr(), out.data_ptr(), 5, 37)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
