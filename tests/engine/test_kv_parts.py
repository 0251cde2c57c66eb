"""A session's KV cut in pieces and put together in another cache is the session's KV."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from paceline.engine.kv_cache import KVGeometry, SlabKVCache
from paceline.engine.kv_parts import KVAssembly, KVPart, cut, name_entries
from paceline.sessions.window import StreamingWindow

GEOMETRY = KVGeometry(2, 2, 4, torch.float32, torch.device("cpu"))
TOKENS = list(range(100, 150))


def cache(geometry: KVGeometry = GEOMETRY, capacity: int = 200) -> SlabKVCache:
    return SlabKVCache(geometry, capacity, max_model_len=capacity)


def holding(kv: SlabKVCache, tokens: list[int], session: str | None = "s") -> SlabKVCache:
    """The cache with an idle session of these tokens, or an entry of none; keys and values are noise."""
    entry = kv.reserve([*tokens, 0], len(tokens) + 1, session)
    assert entry is not None
    for each in entry.tensors:
        each[:, :, : len(tokens)] = torch.randn(each[:, :, : len(tokens)].shape).mul(50).to(each.dtype)
    kv.append(entry, tokens)
    kv.release(entry)
    return kv


def parts_of(kv: SlabKVCache, session: str = "s", tokens_each: int = 7) -> list[KVPart]:
    export = kv.export_session(session)
    assert export is not None
    return list(cut(export, tokens_each * kv.bytes_per_token))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_session_arrives_as_it_was(dtype: torch.dtype) -> None:
    geometry = KVGeometry(2, 2, 4, dtype, torch.device("cpu"))
    sender, receiver = holding(cache(geometry), TOKENS), cache(geometry)
    assembly = KVAssembly(receiver)
    taken = [assembly.take(part) for part in pickle.loads(pickle.dumps(parts_of(sender)))]
    assert taken == [True] * 8
    sent, arrived = sender.export_session("s"), receiver.export_session("s")
    assert sent is not None
    assert arrived is not None
    assert arrived.token_ids.tolist() == TOKENS
    assert all(torch.equal(a, b) for a, b in zip(sent.tensors, arrived.tensors, strict=True))
    receiver.check()
    assert receiver.usage().in_use == 0


def test_parts_of_a_whole_session_are_at_most_as_large_as_asked() -> None:
    parts = parts_of(holding(cache(), TOKENS), tokens_each=20)
    assert [(part.start, part.rows, part.last) for part in parts] == [(0, 20, False), (20, 20, False), (40, 10, True)]
    assert max(part.num_bytes for part in parts) == 20 * GEOMETRY.bytes_per_token


def test_what_lies_read_only_in_shared_memory_is_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    receiver = cache()
    for part in parts_of(holding(cache(), TOKENS)):
        for each in part.data:
            each.flags.writeable = False
        KVAssembly(receiver).take(part)
    assert list(recwarn) == []


def test_a_session_under_a_window_that_shifted_goes_on_where_it_is() -> None:
    window = StreamingWindow(32, 4)
    kv = cache()
    entry = kv.reserve(TOKENS[:1], 32, "s", window)
    assert entry is not None
    entry.dropped = window.dropped(len(TOKENS))
    entry.keys[:, :, :32], entry.values[:, :, :32] = torch.randn(2, 2, 32, 4), torch.randn(2, 2, 32, 4)
    kv.append(entry, TOKENS)
    kv.release(entry)
    receiver = cache()
    assembly = KVAssembly(receiver)
    assert all(assembly.take(part) for part in parts_of(kv))
    receiver.check()
    assert receiver.match([*TOKENS, 1], "s", window) == len(TOKENS)
    assert receiver.sessions() == {"s": (len(TOKENS) - entry.dropped, False)}


def test_no_part_of_it_is_used_before_all_is_there() -> None:
    receiver = cache()
    assembly = KVAssembly(receiver)
    for part in parts_of(holding(cache(), TOKENS))[:-1]:
        assembly.take(part)
    assert receiver.match([*TOKENS, 1], "s") == 0


def test_a_session_given_up_half_way_leaves_nothing() -> None:
    receiver = cache()
    assembly = KVAssembly(receiver)
    assembly.take(parts_of(holding(cache(), TOKENS))[0])
    assembly.give_up("s")
    receiver.check()
    assert (receiver.usage().free, receiver.sessions()) == (200, {})


def test_a_part_that_does_not_follow_the_last_one_gives_the_session_up() -> None:
    receiver, parts = cache(), parts_of(holding(cache(), TOKENS))
    assembly = KVAssembly(receiver)
    assert [assembly.take(part) for part in (parts[0], parts[2], parts[3])] == [True, False, False]
    assert receiver.usage().free == 200


def test_running_sequences_are_not_evicted_for_it() -> None:
    receiver = cache(capacity=60)
    assert receiver.reserve([1, 2], 20) is not None
    taken = [KVAssembly(receiver).take(part) for part in parts_of(holding(cache(), TOKENS))]
    assert taken == [False] * 8
    assert receiver.usage().in_use == 20


def test_idle_entries_are_evicted_for_it() -> None:
    receiver = holding(cache(capacity=60), list(range(40)), "old")
    assembly = KVAssembly(receiver)
    assert all(assembly.take(part) for part in parts_of(holding(cache(), TOKENS)))
    assert list(receiver.sessions()) == ["s"]


def test_keys_of_another_shape_are_refused() -> None:
    receiver = cache(KVGeometry(2, 2, 8, torch.float32, torch.device("cpu")))
    assert not KVAssembly(receiver).take(parts_of(holding(cache(), TOKENS))[0])
    assert receiver.usage().free == 200


def test_a_turn_that_was_faster_than_its_kv_keeps_the_longer_text() -> None:
    receiver = cache()
    assembly, parts = KVAssembly(receiver), parts_of(holding(cache(), TOKENS))
    assembly.take(parts[0])
    holding(receiver, [*TOKENS, 7, 8, 9])
    assert all(assembly.take(part) for part in parts[1:])
    receiver.check()
    assert receiver.sessions() == {"s": (len(TOKENS) + 3, False)}
    assert np.array_equal(receiver.recent(1)[0], [*TOKENS, 7, 8, 9])


def test_entries_of_no_session_are_named_in_place_and_arrive_for_anybody() -> None:
    sender, receiver = holding(cache(), TOKENS, None), cache()
    name_entries(sender, "x", 8)
    assert sender.sessions() == {"x-0": (len(TOKENS), False)}
    assembly = KVAssembly(receiver, anonymous=True)
    assert all(assembly.take(part) for part in parts_of(sender, "x-0"))
    assert (receiver.sessions(), receiver.match([*TOKENS, 1])) == ({}, len(TOKENS))


def test_only_the_entries_used_last_are_named() -> None:
    kv = cache()
    for first in (1, 2, 3):
        holding(kv, [first] * 20, None)
    name_entries(kv, "x", 2)
    kv.check()
    assert {name: kv.export_session(name).token_ids[0] for name in kv.sessions()} == {"x-0": 3, "x-1": 2}  # type: ignore[union-attr]
