"""The draft's shape: presets and what a user may ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from paceline.errors import ConfigError

HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class DraftShape:
    """A Llama: `kept` tokens, `hidden` wide, `layers` deep, `mlp` between the projections."""

    kept: int
    hidden: int
    layers: int
    mlp: int
    kv_heads: int

    def __post_init__(self) -> None:
        for name in ("kept", "hidden", "layers", "mlp", "kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--size: {name} must be positive", param="size")
        if self.hidden % 32 or self.mlp % 32:
            raise ConfigError("--size: hidden and mlp must be multiples of 32", param="size")
        if self.heads % self.kv_heads:
            raise ConfigError(f"--size: {self.heads} heads do not share {self.kv_heads} KV heads", param="size")

    @property
    def head_dim(self) -> int:
        return HEAD_DIM if self.hidden % HEAD_DIM == 0 else 32

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.kept * self.hidden + self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def bytes(self) -> int:
        """On disk and read in a step: int8 with an fp16 scale for every 32."""
        return self.parameters * 34 // 32

    def within(self, vocab_size: int) -> DraftShape:
        """The same, keeping no more tokens than there are."""
        return dataclasses.replace(self, kept=min(self.kept, vocab_size))

    def config(self, **extra: Any) -> Any:
        """A LlamaConfig of this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.kept,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            # Token ids mean kept tokens here; no row of the embedding is special.
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **extra,
        )


PRESETS = {
    "tiny": DraftShape(kept=4096, hidden=128, layers=2, mlp=384, kv_heads=1),
    "small": DraftShape(kept=8192, hidden=256, layers=3, mlp=768, kv_heads=2),
    "medium": DraftShape(kept=16384, hidden=384, layers=5, mlp=1024, kv_heads=2),
    "large": DraftShape(kept=32768, hidden=640, layers=6, mlp=1792, kv_heads=2),
}
AUTO = "auto"


def parse_size(text: str) -> DraftShape | None:
    """A preset's name, or `kept=…,hidden=…,layers=…,mlp=…,kv_heads=…` over the medium one; None for auto."""
    if text == AUTO:
        return None
    if text in PRESETS:
        return PRESETS[text]
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in DraftShape.__dataclass_fields__ or not value.isdigit():
            names = ", ".join((AUTO, *PRESETS))
            raise ConfigError(
                f"--size: {part!r}; give one of {names}, or for example kept=16384,hidden=384,layers=4", param="size"
            )
        values[name] = int(value)
    return dataclasses.replace(PRESETS["medium"], **values)
