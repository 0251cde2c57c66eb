"""C++ of ours, compiled for this host when it is first needed, as a library that Python calls.

No framework headers are involved: a plain C interface, a few seconds of compiling, cached by source, compiler flags and
CPU. Without a C++ compiler there is none, and whoever asks does without.
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
from pathlib import Path

import torch

from paceline.config import cache_dir

logger = logging.getLogger(__name__)

# Sums that may be reordered, which is what vectorizes them, say so in the source; the others keep their order, on which
# it rests that a row's result does not depend on the rows beside it. Not -ffast-math, either: a library linked with it
# makes the whole process flush subnormal numbers to zero.
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")
BUILD = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 120


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
