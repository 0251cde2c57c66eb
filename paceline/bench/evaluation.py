"""`paceline eval`: which model reads which text, against what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.bench.quality import Quality, measure
from paceline.bench.scorers import EngineScorer, Scorer, TransformersScorer
from paceline.bench.text import Text, encode
from paceline.config import EngineSettings
from paceline.engine.load import LoadedModel, load_model
from paceline.errors import ConfigError
from paceline.models import load_causal_lm, load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True, slots=True)
class Reading:
    """The first `tokens` of a text in windows of `context`, of which `stride` are scored; `rows` as in EngineScorer."""

    text: Text
    tokens: int
    context: int
    stride: int
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The model in the folder `path`, run by our engine under `settings` or, where they are None, by its own code in
    float32."""

    path: Path
    settings: EngineSettings | None


def load_candidate(path: Path, settings: EngineSettings, context: int | None) -> LoadedModel:
    """With a KV cache for one window of `context` tokens, unless the settings say how large, or it is None: then the
    memory is left to the reference."""
    if context is not None and settings.kv_tokens == "auto":
        settings = settings.model_copy(update={"kv_tokens": context})
    return load_model(path, settings)


def compare_on_text(
    candidate: LoadedModel,
    reference: Reference,
    reading: Reading,
    on_scored: Callable[[int, int], None] = lambda *_: None,
) -> Quality:
    """Both read the text, side by side. Raises ConfigError or ModelError."""
    scorer = EngineScorer(candidate, reading.rows)
    if tokenizer_fingerprint(load_tokenizer(reference.path)) != candidate.fingerprint:
        raise ConfigError(f"--reference: {reference.path.name} has another tokenizer", param="reference")
    ids, prefix = encode(candidate.tokenizer, reading.text.content, reading.tokens)
    return measure(
        _scorer(reference, reading.context, candidate.runner.device),
        scorer,
        ids,
        context=reading.context,
        stride=reading.stride,
        prefix=prefix,
        on_scored=on_scored,
    )


def _scorer(reference: Reference, context: int, device: torch.device) -> Scorer:
    path, settings = reference.path, reference.settings
    if settings is not None:
        return EngineScorer(load_candidate(path, settings, context))
    return TransformersScorer(load_causal_lm(path, dtype=torch.float32, device=device, attn_implementation="eager"))
