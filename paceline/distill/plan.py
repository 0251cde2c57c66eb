"""What a draft is worth on this machine: steps timed, speed-up expected, size and depth chosen.

With k candidates a step, E(k) tokens committed for each verification, t(n) the target's step over n rows and d the
draft's step, both on this machine one after the other:

    speed-up = E(k) t(1) / (t(k + 1) + k d)

`aside` is the same with the draft on other hardware and ahead in time: nothing is waited for, d = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from paceline.bench.measure import rounds, seconds
from paceline.distill.measure import DEPTHS
from paceline.distill.shape import PRESETS, DraftShape
from paceline.engine.attention import ATTENTION_NAME, Window
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.lean import NotLeanError, lean_runner
from paceline.engine.native import Kernels, kernels
from paceline.engine.products import KEEPING, Int8, LinearBackends, Packer
from paceline.engine.runner import ModelRunner, Runner

CONTEXT = 128
MAX_DRAFT_SHARE = 1 / 8
"""A draft step dearer than this part of a target step is not worth it."""
PRIOR_ACCEPTANCE = {"tiny": 0.45, "small": 0.55, "medium": 0.63, "large": 0.68}
"""Of a candidate, after ten minutes of training; only to choose a size before anything is measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds. `target` by rows in a step."""

    target: Mapping[int, float]
    draft: float

    def window(self, rows: int) -> float:
        """Of a target step over `rows`, between the measured ones by a straight line."""
        known = sorted(self.target)
        below = max((n for n in known if n <= rows), default=known[0])
        above = min((n for n in known if n >= rows), default=known[-1])
        if below == above:
            return self.target[below]
        part = (rows - below) / (above - below)
        return self.target[below] * (1 - part) + self.target[above] * part


@dataclass(frozen=True, slots=True)
class Gain:
    """Expected at one depth."""

    depth: int
    tokens_per_step: float
    speedup: float
    aside: float


def gains(tokens_per_step: Mapping[int, float], costs: Costs) -> list[Gain]:
    """By depth."""
    plain = costs.window(1)
    return [
        Gain(k, rate, rate * plain / (costs.window(k + 1) + k * costs.draft), rate * plain / costs.window(k + 1))
        for k, rate in sorted(tokens_per_step.items())
    ]


def best(found: Sequence[Gain]) -> Gain:
    return max(found, key=lambda gain: gain.speedup)


def expected_tokens(acceptance: float) -> dict[int, float]:
    """Tokens committed for each verification if every candidate stands with the same probability a:
    1 + a + … + a^k (Leviathan et al. 2211.17192)."""
    return {k: sum(acceptance**n for n in range(k + 1)) for k in DEPTHS}


def choose(
    target: Mapping[int, float], draft_cost: Callable[[DraftShape], float], vocab_size: int
) -> tuple[str, DraftShape]:
    """The preset with the highest expected speed-up among those cheap enough; the cheapest if none is."""
    presets = {name: shape.within(vocab_size) for name, shape in PRESETS.items()}
    costs = {name: Costs(target, draft_cost(shape)) for name, shape in presets.items()}
    cheap = {name: c for name, c in costs.items() if c.draft <= MAX_DRAFT_SHARE * c.window(1)}
    if not cheap:
        name = min(costs, key=lambda name: costs[name].draft)
        return name, presets[name]
    name = max(cheap, key=lambda name: best(gains(expected_tokens(PRIOR_ACCEPTANCE[name]), cheap[name])).speedup)
    return name, presets[name]


def target_steps(runner: Runner, repeats: int = 7) -> dict[int, float]:
    """Milliseconds of a target step over 1 to 9 rows."""
    return step_times(runner, (1, 3, 5, 9), repeats)


def draft_step(shape: DraftShape, device: torch.device, repeats: int = 7) -> float:
    """Milliseconds of one step of a draft of this shape, with random weights."""
    return step_times(random_draft(shape, device), (1,), repeats)[1]


def random_draft(shape: DraftShape, device: torch.device) -> Runner:
    """A draft of this shape as it would run on this device."""
    from transformers import LlamaForCausalLM

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM(shape.config(max_position_embeddings=2 * CONTEXT)).to(dtype)
    model = model.eval().requires_grad_(False)
    found = kernels() if device.type == "cpu" else ""
    if isinstance(found, Kernels):
        packer = Packer(LinearBackends(KEEPING, Int8("int8")))
        try:
            return lean_runner(model, found, packer, rounds=packer.rounds)
        except NotLeanError:
            pass
    model.set_attn_implementation(ATTENTION_NAME)
    return ModelRunner(model)


def step_times(runner: Runner, rows: Sequence[int], repeats: int) -> dict[int, float]:
    """Milliseconds of a step at context 128 (or as far as the model goes), by rows; medians over interleaved rounds."""
    context = min(CONTEXT, runner.max_model_len - max(rows))
    room = context + max(rows)
    kv = SlabKVCache(runner.kv_geometry(), room, room)
    ids = [n % runner.vocab_size for n in range(3, 3 + room)]
    entry = kv.reserve(ids, room)
    assert entry is not None
    runner.run([Window(entry, ids[:context], sample=1)])
    kv.append(entry, ids[:context])

    def timed(count: int) -> Callable[[], float]:
        window = Window(entry, ids[:count], sample=count)

        def run() -> None:
            runner.run([window])
            if runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)

        return lambda: 1e3 * seconds(run)

    figures = rounds({str(count): timed(count) for count in rows}, "ms", repeats)
    return {count: figures[str(count)].median for count in rows}
