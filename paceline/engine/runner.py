"""One forward pass over a ragged batch of windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from paceline.engine.attention import ATTENTION_NAME, AttentionStep, RaggedBatch, Window
from paceline.engine.geometry import Observer, Seen, kv_geometry, max_model_len, text_config
from paceline.engine.key_shift import PROBE, KeyReader, KeyShift, found_key_shift
from paceline.engine.kv_blocks import BlockPool
from paceline.engine.kv_cache import KVGeometry
from paceline.engine.kv_memory import KVMemory, Slabs
from paceline.errors import ModelError
from paceline.models.spread import main_device
from paceline.speculation.sampling import Columns, Rows


class Launched(ABC):
    """A step under way whose tokens are drawn where its logits are."""

    @property
    @abstractmethod
    def logits(self) -> torch.Tensor:
        """Of the sampled rows: float32 [rows, vocab]. Those of the next step to be launched may take their place."""

    @abstractmethod
    def tokens(self) -> list[int]:
        """Waits for them: one for each sampled row."""


class Runner(ABC):
    """What the engine and the drafter need of a model."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    def columns(self) -> Columns | None:
        """The tokens that have logits, if not all of the vocabulary have."""
        return None

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Longest prompt plus output the model was made for, in tokens."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def kv_geometry(self) -> KVGeometry:
        """The shape of one token's keys and values in this model."""

    @abstractmethod
    def key_shift(self) -> KeyShift | str:
        """How stored keys follow their tokens to other positions, or why they cannot."""

    @abstractmethod
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        """Logits of every sampled row, in the order of the windows: float32 [sum of `sample`, vocab or `columns`].

        Keys and values are written at each window's positions; the entries' lengths are the caller's to
        advance, once it knows what stays.
        """

    @property
    def launches(self) -> bool:
        """Whether `launch` is more than None."""
        return False

    def launch(
        self,
        windows: Sequence[Window],  # noqa: ARG002  (most cannot)
        rows: Sequence[Rows],  # noqa: ARG002
        feeds: Sequence[int] | None = None,  # noqa: ARG002
    ) -> Launched | None:
        """Begin a step all of whose sampled rows draw, as `rows` say, and do not wait for it; None if that cannot be
        here.

        With `feeds` windows are of one token each, the n-th of which is token feeds[n] of the step launched before:
        nobody needs to have seen it.
        """
        return None

    def name_columns(self, names: torch.Tensor) -> None:  # noqa: B027  (most leave drawing to others)
        """Say which tokens the columns of the logits are, int64 [vocab], for draws made where they are."""

    def kv_memory(
        self,
        geometry: KVGeometry,
        capacity: int,  # noqa: ARG002  (slabs are allocated one by one)
        max_model_len: int,
    ) -> KVMemory:
        """Memory for a KV cache of `capacity` tokens this runs over."""
        return Slabs(geometry, max_model_len)

    def warm_up(self, memory: KVMemory) -> int:  # noqa: ARG002  (most have nothing to prepare)
        """Prepare whatever the first steps over such memory would wait for. Returns how many shapes are ready."""
        return 0

    def close(self) -> None:  # noqa: B027  (most hold nothing that must end)
        """Free what outlives this object: processes. Idempotent; nothing runs afterwards."""

    def flatten(self, windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, positions and sampled rows of a batch, each int64 [n], laid end to end."""
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for window in windows:
            ids.extend(window.token_ids)
            positions.extend(range(window.start, window.end))
            rows.extend(range(len(ids) - window.sample, len(ids)))
        return tuple(torch.tensor(x, dtype=torch.long, device=self.device) for x in (ids, positions, rows))  # type: ignore[return-value]


class TransformersRunner(Runner):
    """Runs a Transformers model as it is; what is known of it comes from its config and from watching it run."""

    model: PreTrainedModel
    _geometry: KVGeometry

    @property
    def vocab_size(self) -> int:
        return int(text_config(self.model).vocab_size)

    @property
    def max_model_len(self) -> int:
        return max_model_len(self.model)

    @property
    def device(self) -> torch.device:
        return self._geometry.device

    def kv_geometry(self) -> KVGeometry:
        return self._geometry

    def key_shift(self) -> KeyShift | str:
        return found_key_shift(self.model, self._geometry.num_layers, self.max_model_len - 1, self._keys_at)

    @abstractmethod
    def _keys_at(self, position: int) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the PROBE tokens, all of them at one position, by layer."""

    def _probe_at(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and positions, each int64 [1, tokens]."""
        ids = torch.tensor([PROBE], device=self.device) % self.vocab_size
        return ids, torch.full_like(ids, position)


class ModelRunner(TransformersRunner):
    """Runs a Transformers causal language model whose attention is ours, all windows in one pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError if our attention is not reached, or the layers bring what the KV cache cannot hold."""
        kind = type(model).__name__
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
            raise ModelError(f"{kind} has attention {model.config._attn_implementation!r}, not ours")
        self.model = model
        self._seen = self._observe()
        if not self._seen:
            raise ModelError(f"{kind} does not call the attention function it is given")
        self._geometry = kv_geometry(self._seen, model)
        self._eager = self._paged = False
        self._check_layer_types()

    def attend_as(self, attention: str, *, paged: bool) -> None:
        """Attend by this kernel (`engine.attn_implementation`), over keys and values in blocks if `paged`."""
        self._eager, self._paged = attention == "eager", paged

    def kv_memory(self, geometry: KVGeometry, capacity: int, max_model_len: int) -> KVMemory:
        return (
            BlockPool.with_room(geometry, capacity)
            if self._paged
            else super().kv_memory(geometry, capacity, max_model_len)
        )

    @torch.inference_mode()
    def run(self, windows: Sequence[Window]) -> torch.Tensor:
        ids, positions, rows = self.flatten(windows)
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            paceline_step=self._step(windows),
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _step(self, windows: Sequence[Window]) -> AttentionStep:
        return RaggedBatch(windows, self._eager)

    @torch.inference_mode()
    def _keys_at(self, position: int) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
        ids, positions = self._probe_at(position)
        reader = KeyReader()
        self.model(input_ids=ids, position_ids=positions, use_cache=False, paceline_step=reader)
        return reader.brought

    @torch.inference_mode()
    def _observe(self) -> dict[int, Seen]:
        observer = Observer()
        zero = torch.zeros((1, 1), dtype=torch.long, device=main_device(self.model))
        self.model(input_ids=zero, position_ids=zero, use_cache=False, paceline_step=observer)
        return observer.seen

    def _check_layer_types(self) -> None:
        """A sliding window is longer than any probe: what the configuration says must arrive, layer by layer."""
        config = text_config(self.model)
        stated = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            stated = None
        kinds = getattr(config, "layer_types", None)
        for layer, seen in self._seen.items():
            kind = kinds[layer] if kinds else "full_attention" if stated is None else "sliding_attention"
            expected = {"full_attention": None, "sliding_attention": stated}.get(kind, -1)
            if seen.sliding_window != expected:
                raise ModelError(f"layer {layer} ({kind}) has the sliding window {seen.sliding_window}, not {stated}")
