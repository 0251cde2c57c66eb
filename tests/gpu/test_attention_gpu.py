"""Attention over windows on a GPU, where a causal mask is told and not spelled out, against a CPU in float32."""

from __future__ import annotations

import pytest
import torch

from paceline.engine.attention import RaggedBatch, Scoring, Window
from paceline.engine.kv_cache import KVEntry, SlabKVCache
from paceline.engine.kv_entry import KVGeometry

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_windows_attend_as_on_a_cpu(dtype: torch.dtype, sliding_window: int | None, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = [(0, 1), (0, 70), (33, 6), (100, 1), (5, 2)]
    rows = sum(new for _, new in lengths)
    query = torch.randn(1, HEADS, rows, HEAD_DIM, generator=draw)
    key, value = torch.randn(2, 1, KV_HEADS, rows, HEAD_DIM, generator=draw)
    history = torch.randn(2, KV_HEADS, max(held for held, _ in lengths), HEAD_DIM, generator=draw)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        windows = [Window(_entry(device, kind, held, history), [0] * new, sample=1) for held, new in lengths]
        tensors = [each.to(device, kind) for each in (query, key, value)]
        scoring = Scoring(HEAD_DIM**-0.5, sliding_window, softcap)
        out = RaggedBatch(windows).attend(0, tensors[0], tensors[1], tensors[2], scoring)
        found.append(out.float().cpu())
    expected, got = found
    assert torch.allclose(got, expected, rtol=0, atol=TOLERANCE[dtype])


def _entry(device: str, dtype: torch.dtype, held: int, history: torch.Tensor) -> KVEntry:
    kv = SlabKVCache(KVGeometry(1, KV_HEADS, HEAD_DIM, dtype, torch.device(device)), 256, 256)
    entry = kv.reserve([0], 256)
    assert entry is not None
    kv.append(entry, [0] * held)
    keys, values = history[:, :, :held].to(device, dtype)
    entry.write(0, 0, keys, values)
    return entry
