"""Which runner serves a model: by trying, not by its name.

its kind can be served at all ─► our attention reproduces the model's logits ─► ModelRunner
                                   └ no ─► a cache over our KV entries does ──► PerSequenceRunner
                                             └ no ─► ModelError: the family and both reasons
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from paceline.engine.attention import ATTENTION_NAME, Window
from paceline.engine.kv_cache import SlabKVCache
from paceline.engine.per_sequence import PerSequenceRunner
from paceline.engine.runner import ModelRunner, Runner, TransformersRunner
from paceline.engine.spread import SpreadRunner
from paceline.errors import EngineError, ModelError
from paceline.models.quantization import runs_in_library
from paceline.models.spread import is_spread, main_device

R = TypeVar("R", bound=Runner)
T = TypeVar("T", bound=TransformersRunner)

PROBE_TOKENS = 24
PROBE_ROOM = 128
"""Of both sequences, if room comes in blocks."""
PROBE_STEPS = (
    ((0, 16), (0, 5)),
    ((16, 17), (5, 6)),
    ((17, 18), (6, 7)),
    ((18, 19), (7, 12)),
    ((19, 24), (12, 24)),
)
"""Windows of two sequences, step by step: prefills, decodes, a decode beside a chunk, verifications."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_HALF = 0.1
"""Largest difference of logits, root mean square of a row over their spread, at which it is the same model: of the
median row of the prefills, of the decodes and of the verifications. Rounding gives 1e-5 in float32 and about 1e-2 in
half precision or where a library rounds activations, a wrong mask or position 0.2 and more. The median, because
rounding may send single tokens to another expert."""


def refuse_unservable(config: Any) -> None:
    """Raise ModelError, with the reason, for a kind of model that cannot be served, before its weights are read."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{family} is an encoder-decoder; only decoder-only models are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{family} is no language model on its own: Transformers has no causal LM for it")
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        raise ModelError(
            f"{family} keeps a recurrent state, which cannot be rolled back to an earlier token as a KV cache can"
        )


def runner_for(model: PreTrainedModel) -> ModelRunner | PerSequenceRunner:
    """The fastest general runner that reproduces the model's own logits on a probe.

    The model is switched to our attention if that works, and left with its own if not. Raises ModelError.
    """
    refuse_unservable(model.config)
    own = model.config._attn_implementation
    ragged = _attempt(lambda: _ragged(model))
    if not isinstance(ragged, str):
        return ragged
    if own != model.config._attn_implementation:
        model.set_attn_implementation(own)
    alone = _attempt(lambda: _probed(PerSequenceRunner(model, ragged), _reference(model)))
    if not isinstance(alone, str):
        return alone
    family = model.config.model_type
    raise ModelError(f"{family} cannot be served: in one batch, {ragged}; sequence by sequence, {alone}")


def probed_logits(trusted: Runner) -> list[torch.Tensor]:
    """What a runner that has been probed gives for the probe: of each sequence [PROBE_TOKENS, vocab]."""
    kv = SlabKVCache(trusted.kv_geometry(), PROBE_ROOM, PROBE_TOKENS)
    rows = []
    for ids in _probe_ids(trusted.vocab_size):
        entry = kv.reserve(ids, PROBE_TOKENS)
        assert entry is not None
        rows.append(trusted.run([Window(entry, ids, sample=len(ids))]))
        kv.release(entry)
    return rows


def require_same(runner: Runner, expected: list[torch.Tensor]) -> None:
    """Raise ModelError, with the difference, unless a runner in half precision reproduces `probed_logits`."""
    _require_close(runner, expected, TOLERANCE_HALF)


def _attempt(build: Callable[[], R]) -> R | str:
    """A runner, or why there is none. Modelling code may fail in any way when it is used in a way it was not for."""
    try:
        return build()
    except (torch.OutOfMemoryError, EngineError):  # no other way is of use, of the second to the other ranks neither
        raise
    except ModelError as error:
        return error.message
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _ragged(model: PreTrainedModel) -> ModelRunner:
    if not model._can_set_attn_implementation():
        raise ModelError(f"{type(model).__name__} does not take Transformers' AttentionInterface")
    # Fused kernels leave soft-capping and sinks out in silence; eager has every family's arithmetic.
    model.set_attn_implementation("eager")
    reference = _reference(model)
    model.set_attn_implementation(ATTENTION_NAME)
    runner = SpreadRunner(model) if is_spread(model) else ModelRunner(model)
    return _probed(runner, reference)


def _probe_ids(vocab_size: int) -> list[list[int]]:
    ids = torch.randint(vocab_size, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    return [ids, ids[::-1]]


@torch.inference_mode()
def _reference(model: PreTrainedModel) -> list[torch.Tensor]:
    """The model's own logits of both sequences, each computed at once: [PROBE_TOKENS, vocab]."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor(_probe_ids(vocab_size), device=main_device(model))
    return [model(input_ids=one[None], use_cache=False).logits[0].float() for one in ids]


def _probed(runner: T, reference: list[torch.Tensor]) -> T:
    """The runner, after it has reproduced the reference in pieces. Raises ModelError with the difference."""
    exact = TOLERANCE.get(runner.kv_geometry().dtype, TOLERANCE_HALF)
    _require_close(runner, reference, TOLERANCE_HALF if runs_in_library(runner.model) else exact)
    return runner


def _require_close(runner: Runner, reference: list[torch.Tensor], tolerance: float) -> None:
    for kind, rows in _differences(runner, reference).items():
        difference = statistics.median(rows)
        if not difference < tolerance:
            raise ModelError(f"its logits differ by {difference:.1e} of their spread in {kind}")


def _differences(runner: Runner, reference: list[torch.Tensor]) -> dict[str, list[float]]:
    """How far each row of logits is from the reference, by what kind of window it was in."""
    sequences = _probe_ids(runner.vocab_size)
    geometry = runner.kv_geometry()
    memory = runner.kv_memory(geometry, PROBE_ROOM, PROBE_TOKENS)
    kv = SlabKVCache(geometry, PROBE_ROOM, PROBE_TOKENS, memory=memory)
    entries = [entry for ids in sequences if (entry := kv.reserve(ids, PROBE_TOKENS)) is not None]
    found: dict[str, list[float]] = {"a prefill": [], "a decode step": [], "a verification": []}
    for step in PROBE_STEPS:
        parts = list(zip(entries, sequences, reference, step, strict=True))
        windows = [Window(entry, ids[start:end], sample=end - start) for entry, ids, _, (start, end) in parts]
        expected = torch.cat([rows[start:end] for _, _, rows, (start, end) in parts])
        away = (runner.run(windows) - expected).square().mean(dim=1).sqrt() / expected.std()
        offset = 0
        for window in windows:
            count = len(window.token_ids)
            kind = "a prefill" if window.start == 0 else "a decode step" if count == 1 else "a verification"
            found[kind] += away[offset : offset + count].tolist()
            offset += count
            kv.append(window.entry, window.token_ids)
    return found
