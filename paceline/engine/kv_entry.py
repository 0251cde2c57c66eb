"""The KV cache's plain data: the shape of a token, the account, one sequence's keys and values, and their export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from paceline.errors import EngineError


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one token's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.num_layers} layers of {self.num_kv_heads} heads of {self.head_dim} in {kind}"


@dataclass(frozen=True, slots=True)
class KVUsage:
    """Tokens of room: free + cached + in_use = total."""

    free: int
    cached: int
    in_use: int
    total: int


@dataclass(eq=False, slots=True)
class KVEntry:
    """Keys and values of one token sequence.

    `keys` and `values` are [num_layers, num_kv_heads, room, head_dim]. `length` tokens are valid; their ids
    are `ids[:length]`. `charged` is the room it takes from the cache's account. `chain` belongs to the
    cache's index of prefixes.
    """

    keys: torch.Tensor
    values: torch.Tensor
    ids: np.ndarray
    charged: int
    session_id: str | None
    length: int = 0
    running: bool = True
    chain: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> np.ndarray:
        return self.ids[: self.length]

    def shared_prefix(self, tokens: np.ndarray) -> int:
        """How many leading ids agree with `tokens`."""
        return common_prefix(self.token_ids, tokens)

    def write_ids(self, tokens: Sequence[int]) -> None:
        """Put ids behind the valid ones and count them. `ids` grows by doubling: most entries stay short."""
        end = self.length + len(tokens)
        if end > len(self.ids):
            wider = np.zeros(max(end, 2 * len(self.ids)), dtype=np.int32)
            wider[: self.length] = self.token_ids
            self.ids = wider
        self.ids[self.length : end] = tokens
        self.length = end


@dataclass(frozen=True, eq=False, slots=True)
class KVExport:
    """What a session has computed, on its own: picklable, on the CPU, sharing no memory with a cache.

    `token_ids` is int32 [tokens]; `keys` and `values` are contiguous [num_layers, num_kv_heads, tokens, head_dim].
    """

    session_id: str
    token_ids: np.ndarray
    keys: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        if self.keys.shape != self.values.shape or self.keys.shape[2] != tokens or not tokens:
            raise EngineError(
                f"KV export: {tokens} token ids, keys {list(self.keys.shape)}, values {list(self.values.shape)}"
            )

    @classmethod
    def of(cls, entry: KVEntry) -> KVExport:
        """A copy of an entry's valid part. It must belong to a session."""
        assert entry.session_id is not None
        n = entry.length
        # A clone, because pickling a view writes the whole slab behind it.
        keys, values = (each[:, :, :n].to("cpu", copy=True).contiguous() for each in (entry.keys, entry.values))
        return cls(entry.session_id, entry.token_ids.copy(), keys, values)

    @property
    def geometry(self) -> KVGeometry:
        layers, heads, _, head_dim = self.keys.shape
        return KVGeometry(layers, heads, head_dim, self.keys.dtype, torch.device("cpu"))

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements agree."""
    n = min(len(a), len(b))
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if len(differs) else n
