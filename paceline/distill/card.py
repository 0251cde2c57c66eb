"""The model card: what the draft is, how it was made, how often its target agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from paceline.distill import plan
from paceline.models.draft_folder import DraftCard

if TYPE_CHECKING:
    from paceline.distill.measure import Acceptance
    from paceline.distill.run import Outcome


def figures(outcome: Outcome, trials: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything measured, for programs."""
    return {
        "shape": asdict(outcome.shape),
        "parameters": outcome.shape.parameters,
        "tokens_written": outcome.tokens_written,
        "training": asdict(outcome.progress),
        "untrained": _numbers(outcome.before[0.0]),
        "acceptance": {
            f"{temperature:g}": {name: _numbers(one) for name, one in found.items()}
            for temperature, found in outcome.acceptance.items()
        },
        "costs_ms": {"target": dict(outcome.costs.target), "draft": outcome.costs.draft},
        "gains": [asdict(gain) for gain in outcome.gains],
        "trials": list(trials),
    }


def readme(outcome: Outcome, card: DraftCard, hardware: str, *, own_prompts: bool) -> str:
    """Markdown."""
    shape, best = outcome.shape, plan.best(outcome.gains)
    size = shape.bytes + 4 * (shape.kept + card.vocab_size)  # Two tables of token ids beside the weights.
    heads = f"{shape.heads} heads over {shape.kv_heads}"
    source = "the prompts it was given" if own_prompts else "openings that come with Paceline (Apache-2.0)"
    text = f"""# A draft for {card.target}

Guesses tokens that {card.target} verifies; made with Paceline for speculative decoding. It is of no use
alone: its output is what its target would say, less well.

| | |
| --- | --- |
| shape | Llama, {shape.layers} layers, {shape.hidden} wide, MLP {shape.mlp}, {heads} |
| vocabulary | {shape.kept} of the target's {card.vocab_size} tokens, in and out |
| parameters | {shape.parameters / 1e6:.1f} million |
| weights | int8 in groups of 32 with fp16 scales, {size / 1e6:.1f} MB |
| training text | {outcome.tokens_written / 1e6:.1f} million tokens, all written by the target itself after {source} |
| training | {outcome.progress.steps} steps on {outcome.progress.tokens / 1e6:.1f} million answer tokens, {hardware} |
| seed | {card.seed} |
"""
    if card.command:
        text += f"\nMade with\n\n    {card.command}\n"
    text += "\n## Acceptance\n\nOn prompts held out from training: tokens committed for each verification step.\n"
    for temperature, found in outcome.acceptance.items():
        name = "Greedy" if temperature == 0 else f"Temperature {temperature:g}, coupled noise"
        text += f"\n{name}:\n\n{_table(found)}"
    text += f"""
Before training: {outcome.before[0.0].tokens_per_step[4]:.2f} at depth 4.

Candidate by candidate, how often it stands if those before it did (greedy): {_positions(outcome)}.

## Speed on the machine it was made on ({hardware})

A target step takes {outcome.costs.window(1):.2f} ms for 1 token and {outcome.costs.window(5):.2f} ms for 5, a draft
step {outcome.costs.draft:.2f} ms. Expected at depth {best.depth}, the best: {best.speedup:.2f} x plain decoding on this
machine alone, {best.aside:.2f} x with the draft on another.

## Licence

The draft was trained on its target's distribution and starts from its embedding: the target's licence holds for it.
"""
    return text


def _table(found: Any) -> str:
    depths = (1, 2, 4, 6, 8)
    lines = ["| prompts | outputs | same token | " + " | ".join(f"depth {k}" for k in depths) + " |"]
    lines.append("| --- " * (3 + len(depths)) + "|")
    for name, one in found.items():
        rates = " | ".join(f"{one.tokens_per_step[k]:.2f}" for k in depths)
        lines.append(f"| {name} | {one.continuations} | {one.agreement:.3f} | {rates} |")
    return "\n".join(lines) + "\n"


def _positions(outcome: Outcome) -> str:
    return ", ".join(f"{rate:.2f}" for rate in outcome.acceptance[0.0]["all"].by_position)


def _numbers(one: Acceptance) -> dict[str, Any]:
    return {
        "continuations": one.continuations,
        "tokens": one.tokens,
        "agreement": round(one.agreement, 4),
        "tokens_per_step": {str(k): round(rate, 4) for k, rate in one.tokens_per_step.items()},
        "by_position": [round(rate, 4) for rate in one.by_position],
    }
