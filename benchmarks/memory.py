"""What a process that serves one model takes: at its peak, and when it has settled.

    python benchmarks/memory.py                      # smollm2-135m
    python benchmarks/memory.py Qwen/Qwen2.5-0.5B-Instruct --kv-tokens 4096

A new process imports the engine, loads the model, fills the KV cache with one prompt and decodes 64 tokens. Fails if
its peak (VmHWM) is not within 15% of weights + KV + 400 MB, where the weights are what matrix products and embedding
hold. File pages the process has mapped count as they do for the kernel. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ALLOWANCE_MB = 400
"""For the interpreter, torch, transformers, tokenizer and activations; the first three alone take some 340."""
SLACK = 1.15
DECODED = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a name, folder or file")
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--weight-dtype", default="auto")
    parser.add_argument("--linear-backend", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        names = ("weight_dtype", "linear_backend", "kv_dtype")
        chosen = {name: getattr(options, name) for name in names}
        print(json.dumps(measure(Path(options.model), options.kv_tokens, chosen)))
        return 0
    return report(in_new_process(options))


def in_new_process(options: argparse.Namespace) -> dict[str, Any]:
    from paceline.models import resolve

    chosen = {
        "--kv-tokens": options.kv_tokens,
        "--weight-dtype": options.weight_dtype,
        "--linear-backend": options.linear_backend,
        "--kv-dtype": options.kv_dtype,
    }
    given = [f"{name}={value}" for name, value in chosen.items()]
    command = [sys.executable, __file__, str(resolve(options.model).path), "--measured", *given]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def measure(path: Path, kv_tokens: int, chosen: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    from paceline.bench.footprint import held_bytes
    from paceline.config import EngineSettings
    from paceline.engine.load import load_model
    from paceline.types import Request, SamplingParams

    imported, imports_mb = time.perf_counter(), resident_mb("VmRSS")
    settings = EngineSettings(device="cpu", kv_tokens=kv_tokens, **chosen)
    model = load_model(path, settings)
    loaded, load_peak_mb = time.perf_counter(), resident_mb("VmHWM")
    weights_mb = held_bytes() / 2**20
    engine = model.engine()
    prompt = tuple(range(100, 100 + min(kv_tokens, model.limits.max_model_len) - DECODED - 1))
    engine.add(Request("r", prompt, SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    return {
        "import_s": imported - begun,
        "load_s": loaded - imported,
        "imports_mb": imports_mb,
        "load_peak_mb": load_peak_mb,
        "weights_mb": weights_mb,
        "kv_mb": kv_tokens * model.kv_geometry.bytes_per_token / 2**20,
        "steady_mb": resident_mb("VmRSS"),
        "peak_mb": resident_mb("VmHWM"),
        "choices": {choice.name: choice.value for choice in model.choices},
    }


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found) / 1024


def report(found: dict[str, Any]) -> int:
    print(", ".join(f"{name} {value}" for name, value in found["choices"].items()))
    bound = SLACK * (found["weights_mb"] + found["kv_mb"] + ALLOWANCE_MB)
    rows = (
        ("imports alone", found["imports_mb"], f"{found['import_s']:.1f} s"),
        ("peak while loading", found["load_peak_mb"], f"{found['load_s']:.1f} s"),
        ("steady, KV cache full", found["steady_mb"], ""),
        ("peak", found["peak_mb"], ""),
        ("weights", found["weights_mb"], "matrix products and embedding"),
        ("KV cache", found["kv_mb"], ""),
        ("bound", bound, f"{SLACK} x (weights + KV + {ALLOWANCE_MB})"),
    )
    for name, mb, note in rows:
        print(f"{name:22s} {mb:7.0f} MB  {note}")
    return int(found["peak_mb"] > bound)


if __name__ == "__main__":
    sys.exit(main())
