"""What smollm2-135m answers to the held-out prompts: kept, so that measuring its draft needs no target.

python -m tests.distill.continuations     makes it anew with the CPU engine, some five minutes
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from paceline.distill.measure import Continuation, sampling
from paceline.types import Request

DATA = Path(__file__).parents[1] / "data"
PROMPTS, FILE = DATA / "held_out_prompts.json", DATA / "held_out_continuations.npz"
TEMPERATURES = (0.0, 0.8)
BATCH = 24


def read(temperature: float) -> list[Continuation]:
    """At one of TEMPERATURES; prompt n draws with seed n."""
    with np.load(FILE) as data:
        prompts, outputs = _cut(data, "prompts"), _cut(data, f"outputs_{temperature:g}")
    found = zip(_categories(), prompts, outputs, strict=True)
    return [Continuation(name, p, o, sampling(temperature, n)) for n, (name, p, o) in enumerate(found)]


def _texts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return found


def _categories() -> list[str]:
    return [name for name, texts in _texts().items() for _ in texts]


def _cut(data: Mapping[str, np.ndarray], name: str) -> list[tuple[int, ...]]:
    ends = data[f"{name}_lengths"].cumsum()[:-1]
    return [tuple(part.tolist()) for part in np.split(data[name], ends)]


def _joined(name: str, rows: Sequence[Sequence[int]]) -> Mapping[str, np.ndarray]:
    flat = np.array(list(itertools.chain(*rows)), dtype=np.uint16)
    return {name: flat, f"{name}_lengths": np.array([len(row) for row in rows], dtype=np.uint16)}


def make() -> None:
    """Write FILE."""
    from paceline.config import EngineSettings
    from paceline.distill import chat
    from paceline.engine.load import load_model
    from paceline.models import resolve

    path = resolve("smollm2-135m").path
    loaded = load_model(path, EngineSettings(device="cpu", max_num_seqs=BATCH, max_queued_requests=2 * BATCH))
    texts = [text for texts in _texts().values() for text in texts]
    prompts = chat.prompts(loaded.tokenizer, chat.chat_format(loaded.tokenizer, loaded.eos), texts)
    arrays = dict(_joined("prompts", prompts))
    engine = loaded.engine()
    for temperature in TEMPERATURES:
        outputs: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(prompts), BATCH):
            for n in range(first, min(first + BATCH, len(prompts))):
                engine.add(Request(str(n), tuple(prompts[n]), sampling(temperature, n)))
            while engine.has_work:
                for name, delta in engine.step().items():
                    outputs[int(name)].extend(delta.token_ids)
            print(f"temperature {temperature:g}: {min(first + BATCH, len(prompts))} of {len(prompts)}", flush=True)
        arrays |= _joined(f"outputs_{temperature:g}", outputs)
    np.savez_compressed(FILE, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    make()
