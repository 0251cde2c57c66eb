"""From a model that runs its own code on a GPU to one that runs as fast as it can there."""

from __future__ import annotations

import logging

import torch

from paceline.config import EngineSettings
from paceline.engine.backends import Backends, Choice
from paceline.engine.families import probed_logits, require_same
from paceline.engine.gpu.attention import PagedAttention
from paceline.engine.gpu.body import Body, OwnCode
from paceline.engine.gpu.fused import FusedBody
from paceline.engine.gpu.runner import MOST_GRAPH_ROWS, DeviceRunner
from paceline.engine.kv_blocks import BLOCK
from paceline.engine.lean import NotLeanError
from paceline.engine.runner import ModelRunner, Runner
from paceline.engine.tp.group import Group
from paceline.errors import ConfigError, ModelError
from paceline.models.quantization import runs_in_library

logger = logging.getLogger(__name__)


def on_device(
    own: ModelRunner, backends: Backends, settings: EngineSettings, group: Group | None = None
) -> tuple[Runner, list[Choice]]:
    """A runner over keys and values in blocks that reproduces the model's logits; `own` itself if there is none.

    Fused layers if the model is built for it, its own code if not; short steps as graphs.
    """
    # What the model itself is needed for, before its weights go.
    expected, key_shift = probed_logits(own), own.key_shift()
    body, how, why = _body(own, backends, group)
    graphs = backends.fuses and not runs_in_library(own.model)
    runner = DeviceRunner(
        body,
        key_shift=key_shift,
        geometry=own.kv_geometry(),
        max_rows=settings.max_batched_tokens,
        max_sequences=settings.max_num_seqs,
        block=BLOCK if backends.paged else own.max_model_len,
        graphs=graphs,
    )
    try:
        _try(runner, expected)
    except ModelError as error:
        if backends.weights_in_bytes:
            raise  # the weights it was loaded with are gone
        logger.warning("attention by %s is not used: %s", backends.attention, error.message)
        refused = Choice("attention", "sdpa", f"by {backends.attention} {error.message}")
        return own, [refused, Choice("forward pass", "transformers", ""), Choice("kv layout", "static", "")]
    captured = f", steps of up to {MOST_GRAPH_ROWS} rows as CUDA graphs" if graphs else ""
    return runner, [Choice("forward pass", how + captured, why)]


def _try(runner: DeviceRunner, expected: list[torch.Tensor]) -> None:
    """Raise ModelError unless it runs, and gives what is expected. A library may lack what a model needs."""
    try:
        require_same(runner, expected)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(f"does not run: {' '.join(str(error).split())[:150]}") from error


def _body(own: ModelRunner, backends: Backends, group: Group | None) -> tuple[Body, str, str]:
    attention = PagedAttention(backends.attention, own.device)
    if not backends.fuses:
        return OwnCode(own, attention), "transformers", "engine.compile is false"
    try:
        return (
            FusedBody(own.model, attention, in_bytes=backends.weights_in_bytes, group=group),
            "fused",
            "the model is built like Llama",
        )
    except NotLeanError as error:
        if backends.weights_in_bytes:
            raise ConfigError(
                f"engine.weight_dtype: int8 on a GPU is for models built like Llama ({error}); "
                "use engine.quantization: bitsandbytes_8bit",
                param="engine.weight_dtype",
            ) from None
        return OwnCode(own, attention), "transformers", f"its layers are not fused: {error}"
