"""The KV cache's plain data: the shape of a token, the account, one sequence's keys and values, and their export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from paceline.errors import EngineError
from paceline.sessions.window import StreamingWindow, dropped_under

SCALE_DTYPE = torch.float32
"""Of a quantized key or value: 4 bytes beside 64 or 128. Half precision would save 2 of them and need a rounding of
its own before it divides."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one token's keys and values, and the type they are stored in: int8 means quantized."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor) -> KVGeometry:
        """Of keys [num_layers, num_kv_heads, tokens, head_dim] of any device, as if they lay in host memory, where
        those of one replica are compared with another's."""
        layers, heads, _, head_dim = keys.shape
        return cls(layers, heads, head_dim, keys.dtype, torch.device("cpu"))

    @property
    def bytes_per_token(self) -> int:
        scale = SCALE_DTYPE.itemsize if self.is_quantized else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale)

    @property
    def is_quantized(self) -> bool:
        return self.dtype == torch.int8

    def quantized(self) -> KVGeometry:
        return replace(self, dtype=torch.int8)

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


@dataclass(frozen=True, slots=True)
class SessionKV:
    """How much of a session is held, and where: `tier` is device, host or disk."""

    session_id: str
    tokens: int
    running: bool
    num_bytes: int
    tier: str = "device"


@dataclass(eq=False, slots=True)
class KVEntry:
    """Keys and values of one token sequence.

    `keys` and `values` are [num_layers, num_kv_heads, room, head_dim]; if they are int8, `scales` has one number
    for each key and one for each value, both [num_layers, num_kv_heads, room], and a key is its scale times what
    is stored. `length` tokens were computed; their ids are `ids[:length]`. `charged` is the room it takes from the
    cache's account. `chain` and `names` belong to the cache's index of prefixes.

    An entry in blocks has the whole pool as `keys`, `values` and `scales`, and its token at position p in slot
    `slots[p]`, int64 [room], of it; without `slots` that is p. `at` says so for both.

    Of the tokens computed the streaming `window` has `dropped` some behind the first; the `held` others lie at
    positions 0, 1, … in their order.

        ids     sinks │ dropped │ the latest
        keys    sinks │ the latest
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None
    ids: np.ndarray
    charged: int
    session_id: str | None
    length: int = 0
    running: bool = True
    window: StreamingWindow | None = None
    dropped: int = 0
    chain: list[int] = field(default_factory=list)
    names: dict[int, int] = field(default_factory=dict)
    slots: torch.Tensor | None = None
    blocks: list[int] = field(default_factory=list)

    @classmethod
    def outline(cls, session_id: str, token_ids: np.ndarray, window: StreamingWindow | None) -> KVEntry:
        """One without keys and values: for what is kept elsewhere to be found and compared by."""
        nothing = torch.empty(0)
        dropped = dropped_under(window, len(token_ids))
        length = len(token_ids)
        return cls(nothing, nothing, None, token_ids, 0, session_id, length, False, window, dropped)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All it holds; tokens are dimension 2 of each."""
        return (self.keys, self.values, *(self.scales or ()))

    @property
    def room(self) -> int:
        return self.keys.shape[2] if self.slots is None else len(self.slots)

    @property
    def is_slab(self) -> bool:
        """Whether it has memory of its own, on the CPU."""
        return self.keys.device.type == "cpu" and self.slots is None

    @property
    def block(self) -> int:
        """Tokens of each of its `blocks`."""
        return self.room // len(self.blocks)

    def at(self, rows: slice) -> slice | torch.Tensor:
        """Where positions lie in dimension 2 of `tensors`."""
        return rows if self.slots is None else self.slots[rows]

    def taken(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """All it holds at these positions: views, or copies of what lies in blocks."""
        place = self.at(rows)
        return tuple(each[:, :, place] for each in self.tensors)

    def put(self, start: int, tensors: Sequence[torch.Tensor]) -> None:
        """Write what `taken` gave, of any device, at positions from `start` on."""
        place = self.at(slice(start, start + tensors[0].shape[2]))
        for to, of in zip(self.tensors, tensors, strict=True):
            to[:, :, place] = of.to(to.device)

    def fill(self, tokens: int) -> None:
        """Put something at the first positions, for measurements: what it is costs no time."""
        place = self.at(slice(0, tokens))
        for each in (self.keys, self.values):
            each[:, :, place] = 0.5

    @property
    def held(self) -> int:
        """Tokens whose keys and values are here; the position of the next."""
        return self.length - self.dropped

    @property
    def left(self) -> int:
        """Tokens that fit behind those held, before its streaming window shifts."""
        end = self.charged if self.window is None else min(self.charged, self.window.ctx_size)
        return end - self.held

    @property
    def full(self) -> bool:
        """Whether the streaming window must shift before another token is computed."""
        return self.window is not None and self.held >= self.window.ctx_size

    def dropped_at(self, length: int) -> int:
        """What its first `length` tokens lack, where it is as if no more had ever been computed: see `keeps`."""
        return self.dropped if self.window is not None and self.window.dropped(length) == self.dropped else 0

    def keeps(self, length: int) -> int:
        """How many of its first `length` tokens it can be cut to.

        What a window dropped since then is gone: then only the sinks are as they were.
        """
        length = min(length, self.length)
        if self.window is None or self.window.dropped(length) == self.dropped:
            return length
        return min(length, self.window.n_keep)

    def serves(self, shared: int, window: StreamingWindow | None) -> int:
        """How many of its first `shared` tokens a sequence under `window` can go on from.

        Before anything is dropped, keys and values are the same under any window and under none.
        """
        if window == self.window:
            return self.keeps(shared)
        plain = min(shared, self.length)
        if self.dropped and self.window is not None:
            plain = min(plain, self.window.n_keep)
        return plain if window is None else min(plain, window.ctx_size)

    def cut(self, length: int) -> None:
        """Forget everything from the token at `length` on, and what cannot be kept without it."""
        self.length = self.keeps(length)
        self.dropped = self.dropped_at(self.length)

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put one layer's keys and values, each [num_kv_heads, tokens, head_dim], at positions from `start` on."""
        rows = self.at(slice(start, start + keys.shape[1]))
        if self.scales is not None:
            keys, self.scales[0][layer, :, rows] = quantize(keys)
            values, self.scales[1][layer, :, rows] = quantize(values)
        self.keys[layer, :, rows] = keys
        self.values[layer, :, rows] = values

    def read(self, layer: int, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, each [num_kv_heads, tokens, head_dim]: views, or copies if they lie in blocks,
        in `dtype` if they are quantized."""
        place = self.at(rows)
        keys, values = self.keys[layer, :, place], self.values[layer, :, place]
        if self.scales is None:
            return keys, values
        by_key, by_value = (scales[layer, :, place, None] for scales in self.scales)
        return (keys * by_key).to(dtype), (values * by_value).to(dtype)

    def check(self) -> None:
        """Raise EngineError unless it is sound in itself."""
        room = self.room if self.slots is not None else min(each.shape[2] for each in self.tensors)
        if not 0 <= self.held <= self.charged <= room or self.length > len(self.ids):
            raise EngineError(f"KV entry out of bounds: {self.held}, {self.charged}, {self.keys.shape}")
        if self.dropped != dropped_under(self.window, self.length):
            raise EngineError(f"KV entry with {self.length} tokens has dropped {self.dropped}: {self.window}")

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

    `token_ids` is int32 [tokens]; `keys`, `values` and `scales` are a KVEntry's, contiguous, with those its `window`
    has not dropped as room.
    """

    session_id: str
    token_ids: np.ndarray
    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None
    window: StreamingWindow | None = None

    def __post_init__(self) -> None:
        tokens = len(self.token_ids) - self.dropped
        alike = self.keys.shape == self.values.shape and self.keys.dtype == self.values.dtype
        if not alike or self.keys.shape[2] != tokens or not tokens:
            raise EngineError(
                f"KV export: {tokens} tokens held, keys {list(self.keys.shape)}, values {list(self.values.shape)}"
            )
        shapes = [list(each.shape) for each in self.scales or ()]
        if shapes != ([list(self.keys.shape[:3])] * 2 if self.geometry.is_quantized else []):
            raise EngineError(f"KV export: scales {shapes} of keys {list(self.keys.shape)} in {self.keys.dtype}")

    @classmethod
    def of(cls, entry: KVEntry) -> KVExport:
        """A copy of an entry's valid part. It must belong to a session."""
        assert entry.session_id is not None
        # A clone, because pickling a view writes the whole slab behind it.
        held = entry.taken(slice(0, entry.held))
        keys, values, *scales = (each.to("cpu", copy=True).contiguous() for each in held)
        by_token = (scales[0], scales[1]) if scales else None
        return cls(entry.session_id, entry.token_ids.copy(), keys, values, by_token, entry.window)

    @classmethod
    def moved(cls, entry: KVEntry) -> KVExport:
        """The valid part of an entry that is given up: on a CPU nothing is copied, its slab lives on in the export and
        is no more contiguous than it was (`packed`)."""
        if not entry.is_slab:
            return cls.of(entry)
        assert entry.session_id is not None
        keys, values, *scales = entry.taken(slice(0, entry.held))
        by_token = (scales[0], scales[1]) if scales else None
        return cls(entry.session_id, entry.token_ids, keys, values, by_token, entry.window)

    def packed(self, *, quantized: bool = False) -> KVExport:
        """The same in memory of its own size, as int8 if `quantized`."""
        if quantized and self.scales is None:
            (keys, by_key), (values, by_value) = quantize(self.keys), quantize(self.values)
            return replace(self, keys=keys, values=values, scales=(by_key, by_value))
        keys, values, *scales = (each.contiguous() for each in self.tensors)
        return replace(self, keys=keys, values=values, scales=(scales[0], scales[1]) if scales else None)

    def restored(self, dtype: torch.dtype) -> KVExport:
        """What was `quantized` in another type again: rounded."""
        if self.scales is None or dtype == torch.int8:
            return self
        keys, values = (
            (each * scale[..., None]).to(dtype)
            for each, scale in zip((self.keys, self.values), self.scales, strict=True)
        )
        return replace(self, keys=keys, values=values, scales=None)

    @property
    def dropped(self) -> int:
        return dropped_under(self.window, len(self.token_ids))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.keys, self.values, *(self.scales or ()))

    @property
    def geometry(self) -> KVGeometry:
        return KVGeometry.of(self.keys)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.tensors)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[…, head_dim] to int8 and its scales […]: symmetric, the largest magnitude becomes 127."""
    x = x.to(SCALE_DTYPE)
    top = x.abs().amax(dim=-1)
    inverse = torch.where(top > 0, 127 / top, 0)
    return (x * inverse[..., None]).round().to(torch.int8), top / 127


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements agree."""
    n = min(len(a), len(b))
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if len(differs) else n
