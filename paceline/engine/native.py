"""Our CPU kernels, compiled for this host when they are first needed, and how Python calls them.

No framework headers are involved: a plain C interface, a few seconds of compiling, cached by source, compiler
flags and CPU. Without a C++ compiler there are no kernels, and the engine runs the model's own code.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from paceline.config import cache_dir

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
# Sums that may be reordered, which is what vectorizes them, say so in the source; the others keep their order, on which
# it rests that a row's result does not depend on the rows beside it. Not -ffast-math, either: a library linked with it
# makes the whole process flush subnormal numbers to zero.
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")
BUILD = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fPIC", "-shared")
FLAGS = (*BUILD, *MATH)
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 120

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class WindowStruct(ctypes.Structure):
    """`Window` of kernels.cpp."""

    _fields_ = (
        ("row", _I),
        ("start", _I),
        ("rows", _I),
        ("keys", _P),
        ("values", _P),
        ("key_scales", _P),
        ("value_scales", _P),
        ("room", _I),
    )


class HeadsStruct(ctypes.Structure):
    """`Heads` of kernels.cpp."""

    _fields_ = (
        ("heads", _I),
        ("kv_heads", _I),
        ("dim", _I),
        ("rotary_dim", _I),
        ("scale", _F),
        ("norm_eps", _F),
        ("q_norm", _P),
        ("k_norm", _P),
        ("sliding_window", _I),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        ("qkv", _P),
        ("out", _P),
        ("gate_up", _P),
        ("down", _P),
        ("attention_norm", _P),
        ("mlp_norm", _P),
        ("heads", _P),
        ("rotates", _I),
        ("width", _I),
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The library's functions; their arguments are addresses (`Tensor.data_ptr()`) and sizes. See kernels.cpp."""

    library: ctypes.CDLL

    def __post_init__(self) -> None:
        signatures = {
            "add_rms_norm": (_P, _P, _F, _P, _F, _P, _I, _I),
            "silu_mul": (_P, _P, _I, _I),
            "attention": (_P, _P, _P, _P, _I, _I, _P, _P),
            "run_layers": (_P, _I, _P, _P, _F, _F, _P, _P, _I, _I, _P, _P, _P, _I, _P),
        }
        for name, arguments in signatures.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, None


@cache
def kernels() -> Kernels | str:
    """The kernels, or why there are none."""
    library = compiled(SOURCE, FLAGS)
    return library if isinstance(library, str) else Kernels(library)


def compiled(source: Path, flags: Sequence[str]) -> ctypes.CDLL | str:
    """A C++ file as a library, or why it cannot be one here."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) on the path"
    try:
        return ctypes.CDLL(str(_library(compiler, source, flags)))
    except subprocess.CalledProcessError as error:
        logger.warning("compiling %s failed: %s", source.name, error.stderr)
        return f"{compiler} failed to compile them; the log has its message"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"they cannot be built or loaded: {error}"


def _library(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """The compiled library in the cache; built into a temporary name first, so that processes may race."""
    folder = cache_dir() / "kernels"
    path = folder / f"{_fingerprint(compiler, source, flags)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [compiler, *flags, str(source), "-o", str(built), *_openmp()]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            built.replace(path)
    return path


def _openmp() -> list[str]:
    """Link with the OpenMP runtime torch has loaded: two of them would fight over the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else []


def _fingerprint(compiler: str, source: Path, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    parts = (source.read_text(), version, " ".join(flags), _cpu(), torch.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
