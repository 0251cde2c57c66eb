"""What a loaded model takes of memory, in a process of its own: what `paceline estimate --measure` compares with.

    python -m paceline.bench.footprint FOLDER SETTINGS PROMPT DECODED

A new process imports the engine, loads the model, prefills one prompt and decodes; SETTINGS are those of EngineSettings
as JSON. On a GPU the figures are PyTorch's own. On a CPU weights are what tensors and FBGEMM's packed weights hold, and
the peak is how far the process' own memory rose above that of its imports and its tokenizer, and what it keeps mapped
of files at the end; pages of files that come and go while weights are read are left out (Linux).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError, PacelineError

if TYPE_CHECKING:
    from paceline.engine.load import LoadedModel

TIMEOUT_S = 3600.0
INTERVAL_S = 0.003


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes. `rows` were prefilled at most in a step, `tokens` are in the KV cache at the end."""

    weights: int
    peak: int
    kv_bytes_per_token: int
    rows: int
    tokens: int


def measure(path: Path, settings: Mapping[str, Any], prompt: int, decoded: int) -> Measured:
    """In a new process. Raises ConfigError with what `load_model` found wrong, or how the process ended."""
    command = [sys.executable, "-m", __name__, str(path), json.dumps(dict(settings)), str(prompt), str(decoded)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"--measure: the model was not measured within {TIMEOUT_S / 60:.0f} minutes") from None
    lines = ran.stdout.splitlines()
    if ran.returncode == 0:
        return Measured(**json.loads(lines[-1]))
    if ran.returncode < 0:
        raise ConfigError(f"--measure: killed by signal {-ran.returncode}, often for want of memory")
    reasons = lines or ran.stderr.strip().splitlines() or ["no reason given"]
    raise ConfigError(f"--measure: {reasons[-1]}")


def measure_here(path: Path, settings: Mapping[str, Any], prompt: int, decoded: int) -> Measured:
    """In this process, which must not have loaded anything yet."""
    import torch

    from paceline.config import EngineSettings
    from paceline.engine.backends import resolve_backends
    from paceline.engine.load import load_model
    from paceline.models import draft_folder, load_tokenizer

    chosen = EngineSettings.model_validate(settings)
    resolve_backends(chosen)  # builds kernels, if need be
    if not draft_folder.is_draft(path):
        load_tokenizer(path)
    held_before, watch = held_bytes(), _Watch()
    model = load_model(path, chosen)
    on_gpu = model.runner.device.type == "cuda"
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    prompt = min(prompt, model.limits.max_model_len - decoded - 1)
    _answer(model, prompt, decoded)
    rise = watch.rise()
    return Measured(
        weights=allocated if on_gpu else held_bytes() - held_before,
        peak=torch.cuda.max_memory_allocated() if on_gpu else rise,
        kv_bytes_per_token=model.kv_geometry.bytes_per_token,
        rows=min(prompt, chosen.max_batched_tokens),
        tokens=prompt + decoded,
    )


def _answer(model: LoadedModel, prompt: int, decoded: int) -> None:
    from paceline.types import Request, SamplingParams

    engine = model.engine()
    ids = tuple(token % model.runner.vocab_size for token in range(100, 100 + prompt))
    engine.add(Request("r", ids, SamplingParams(temperature=0.0, max_tokens=decoded, ignore_eos=True)))
    while engine.has_work:
        engine.step()


def held_bytes() -> int:
    """Of all CPU tensors there are, and of what FBGEMM packed: no tensors, and filled up to multiples of 512 inputs."""
    import torch

    gc.collect()
    held: dict[int, int] = {}
    for each in gc.get_objects():
        packed = _inside(each) if type(each) is types.CellType else None
        if isinstance(packed, torch.ScriptObject):
            outputs, inputs = torch.ops.quantized.linear_unpack_fp16(packed)[0].shape
            held[id(packed)] = outputs * -(-inputs // 512) * 512 * 2
        elif not issubclass(type(each), torch.Tensor) or hasattr(type(each), "__tensor_flatten__"):
            continue  # what a tensor of several is made of is counted by itself
        elif each.device.type != "cpu":
            continue
        elif each.layout is torch.strided:
            held[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        else:  # oneDNN's tiles
            held[id(each)] = each.numel() * each.itemsize
    return sum(held.values())


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


class _Watch:
    """How far this process' memory rises. The kernel's own peak counts every page of a file that was ever read."""

    def __init__(self) -> None:
        self._files, self._begun = _resident("RssFile"), _resident("RssAnon")
        self._most = self._begun
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def rise(self) -> int:
        """Bytes, so far; ends the watch."""
        self._done.set()
        self._thread.join()
        return self._most - self._begun + max(0, _resident("RssFile") - self._files)

    def _run(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._most = max(self._most, _resident("RssAnon"))


def _resident(field: str) -> int:
    """RssAnon or RssFile of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found) * 1024


def main(arguments: list[str]) -> int:
    """Prints a Measured as JSON, or why there is none."""
    from pydantic import ValidationError

    from paceline.config import config_error

    path, settings, prompt, decoded = arguments
    try:
        found = measure_here(Path(path), json.loads(settings), int(prompt), int(decoded))
    except ValidationError as error:
        print(config_error(error, "engine").message)
        return 1
    except PacelineError as error:
        print(error.message)
        return 1
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
