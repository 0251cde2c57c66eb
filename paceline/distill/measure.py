"""How often the target agrees with the draft, measured as it is used: propose, verify, go on after the accepted run.

The accepted part of a proposal equals the target's own text. So what the draft proposes at a place depends on that
text alone, one pass of the draft over it shows where the two agree, and counting the verification steps is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from paceline.distill.draft import DraftBody, Tokens
from paceline.distill.text import Rows
from paceline.speculation import coupling
from paceline.types import SamplingParams

DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8)
MAX_TOKENS = 128
BATCH = 64
WARM = 0.8
"""The temperature besides 0 at which drafts are compared."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the target answers to one prompt, and how it drew. `params` has a seed unless greedy."""

    category: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Figures of one set of continuations.

    `tokens_per_step[k]`: tokens committed for each verification at depth k, the target's own included.
    `by_position[j]`: how often candidate j + 1 is accepted if those before it were.
    """

    continuations: int
    tokens: int
    agreement: float
    tokens_per_step: Mapping[int, float]
    by_position: tuple[float, ...]


def sampling(temperature: float, seed: int, max_tokens: int = MAX_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=None if temperature == 0 else seed, max_tokens=max_tokens)


@torch.inference_mode()
def continuations(
    target: PreTrainedModel,
    prompts: Sequence[tuple[str, Sequence[int]]],
    eos: Collection[int],
    temperature: float,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> list[Continuation]:
    """The target's answers to (category, token ids), batched; each prompt draws with a seed of its own."""
    target.set_attn_implementation("sdpa")
    found: dict[int, Continuation] = {}
    # Alike lengths together: less padding.
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n][1]))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        params = [sampling(temperature, seed + n, max_tokens) for n in batch]
        outputs = _answers(target, [prompts[n][1] for n in batch], params, eos, max_tokens)
        for n, one, output in zip(batch, params, outputs, strict=True):
            found[n] = Continuation(prompts[n][0], tuple(prompts[n][1]), tuple(output), one)
    return [found[n] for n in range(len(prompts))]


def _answers(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    eos: Collection[int],
    max_tokens: int,
) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    device = target.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache, outputs = DynamicCache(), [[] for _ in prompts]  # type: ignore[var-annotated]
    running = [True] * len(prompts)
    for _ in range(max_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = target(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        lengths = [len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True)]
        drawn = _draw(logits, params, lengths)
        for n, token in enumerate(drawn):
            if running[n]:
                outputs[n].append(token)
                running[n] = token not in eos
        if not any(running):
            break
        ids = torch.tensor(drawn, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return outputs


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    if all(one.greedy for one in params):
        found: list[int] = logits.argmax(dim=-1).tolist()
        return found
    return [coupling.draw(logits[n : n + 1], one, [positions[n]])[0] for n, one in enumerate(params)]


@torch.inference_mode()
def agreements(draft: DraftBody, tokens: Tokens, texts: Sequence[Continuation]) -> list[list[bool]]:
    """Of every token after the first of each output, whether the draft would have proposed it there."""
    device = draft.head.device
    found = []
    for text in texts:
        whole = [*text.prompt, *text.output][:-1]
        ids = torch.tensor([whole], dtype=torch.int32, device=device)
        rows = Rows(ids, torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool))
        states = draft.states(rows)[0, len(text.prompt) :]
        logits = torch.nn.functional.linear(states.float(), draft.head.float())
        drawn = proposals(logits, tokens, text.params, range(len(text.prompt) + 1, len(whole) + 1))
        found.append([a == b for a, b in zip(drawn, text.output[1:], strict=True)])
    return found


def proposals(logits: torch.Tensor, tokens: Tokens, params: SamplingParams, positions: range) -> list[int]:
    """The target's ids the draft draws from [n, K] logits at those positions, with the noise of those ids."""
    if not len(logits):
        return []
    kept = tokens.kept.to(logits.device)
    found: list[int] = coupling.draw_rows(logits, [params] * len(logits), list(positions), kept).tolist()
    return found


def steps(agreed: Sequence[bool], depth: int) -> int:
    """Verification steps in which these tokens are committed, at a fixed depth."""
    count = done = 0
    while done < len(agreed):
        accepted = 0
        while accepted < depth and done + accepted < len(agreed) and agreed[done + accepted]:
            accepted += 1
        done += accepted + 1
        count += 1
    return count


def summarize(agreed: Iterable[Sequence[bool]]) -> Acceptance:
    """Figures over many outputs; those of a single token say nothing."""
    texts = [one for one in agreed if one]
    total = sum(len(one) for one in texts)
    rates = {k: total / max(1, sum(steps(one, k) for one in texts)) for k in DEPTHS}
    return Acceptance(
        continuations=len(texts),
        tokens=total,
        agreement=sum(sum(one) for one in texts) / max(1, total),
        tokens_per_step=rates,
        by_position=_by_position(texts),
    )


def by_category(texts: Sequence[Continuation], agreed: Sequence[Sequence[bool]]) -> dict[str, Acceptance]:
    """The figures of each category, and of `all`."""
    categories = dict.fromkeys(text.category for text in texts)
    found = {
        name: summarize([a for text, a in zip(texts, agreed, strict=True) if text.category == name])
        for name in categories
    }
    return found | {"all": summarize(agreed)}


def _by_position(texts: Sequence[Sequence[bool]]) -> tuple[float, ...]:
    """Of proposals as deep as there are depths, walking as a server would: accepted run, then one more token."""
    depth = DEPTHS[-1]
    tried, stood = [0] * depth, [0] * depth
    for agreed in texts:
        done = 0
        while done < len(agreed):
            run = 0
            while run < depth and done + run < len(agreed):
                tried[run] += 1
                if not agreed[done + run]:
                    break
                stood[run] += 1
                run += 1
            done += run + 1
    return tuple(s / t if t else 0.0 for s, t in zip(stood, tried, strict=True))


@torch.inference_mode()
def row_agreement(
    draft: DraftBody, tokens: Tokens, rows: Rows, states: torch.Tensor, head: torch.Tensor
) -> tuple[float, float]:
    """Quick figures on rows of text with the target's states there: how often both like the same token best, and how
    likely an optimal coupling accepts at temperature 0.8 (1 - total variation), over the answers."""
    where = rows.answers[:, 1:].flatten().nonzero().flatten()
    where = where + where // (rows.length - 1)
    same, overlap = 0.0, 0.0
    mine = draft.states(rows).flatten(0, 1)[where]
    kept = tokens.kept.to(head.device)
    for part in range(0, len(where), 2048):
        q = torch.nn.functional.linear(mine[part : part + 2048].float(), draft.head.float())
        p = torch.nn.functional.linear(states.flatten(0, 1)[where[part : part + 2048]], head).float()
        same += float((p.argmax(dim=-1) == kept[q.argmax(dim=-1)]).sum())
        p, q = p / WARM, q / WARM
        overlap += float(torch.minimum(p.softmax(dim=-1)[:, kept], q.softmax(dim=-1)).sum())
    return same / max(1, len(where)), overlap / max(1, len(where))
