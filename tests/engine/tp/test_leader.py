"""Rank 0 and one that follows, over a real connection: every step, and every change of KV, on both."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from paceline.config import EngineSettings
from paceline.engine.tp import channel, follower, plan
from paceline.engine.tp.leader import Leader
from paceline.engine.tp.runner import ShardedRunner
from paceline.engine.tp.share import Share
from paceline.errors import EngineError
from paceline.speculation.local import LocalProposer
from paceline.speculation.sampling import Rows
from paceline.types import SamplingParams
from tests import tiny

MODEL = tiny.tiny_llama()
PROMPTS = [tiny.prompt(n, seed=n) for n in (5, 40, 17)]
SETTINGS = EngineSettings(tensor_parallel_size=2, collective_timeout_s=20)
KEY = bytes(32)


@contextmanager
def two_ranks() -> Iterator[tuple[ShardedRunner, Share, Share]]:
    """A runner of two ranks and their shares. Each has the whole model, so that nothing is to be summed, and
    answers for one of its two KV heads."""
    leader = Leader.open(SETTINGS)
    other = HeadsOf(tiny.ours(MODEL), range(1, 2))
    thread = threading.Thread(target=_follow, args=(leader, other))
    thread.start()
    leader.join()
    try:
        first = HeadsOf(tiny.ours(MODEL), range(1))
        yield ShardedRunner(leader, first, [range(1), range(1, 2)]), first, other
    finally:
        leader.close()
        thread.join(10)
        assert not thread.is_alive()


class HeadsOf(Share):
    """Gives and takes some heads of its entries alone, as if it had no others."""

    def __init__(self, runner: tiny.Runner, heads: range) -> None:
        super().__init__(runner)
        self._kept = slice(heads.start, heads.stop)

    def do(self, operations):  # type: ignore[no-untyped-def]
        result = super().do(operations)
        if operations and operations[-1][0] == plan.Op.GATHER:
            return tuple(each[:, self._kept] for each in result)
        return result

    def put(self, entry, start, tensors):  # type: ignore[no-untyped-def]
        for to, of in zip(self.entries[entry].tensors, tensors, strict=True):
            to[:, self._kept, start : start + of.shape[2]] = of


def _follow(leader: Leader, share: Share) -> None:
    meeting = leader.meeting
    said = channel.connect(meeting.host, meeting.plan_port, bytes.fromhex(meeting.key), 1)
    follower.execute(said, share)


def test_a_batch_gives_the_tokens_of_one_process() -> None:
    requests = [tiny.request(ids, f"r{n}", temperature=0.8, seed=n) for n, ids in enumerate(PROMPTS)]
    expected = tiny.run(tiny.engine_for(MODEL, depth=1), *requests)
    with two_ranks() as (runner, _, _):
        assert tiny.run(tiny.engine_for(MODEL, runner=runner, depth=1), *requests) == expected


def test_speculation_gives_the_tokens_of_one_process() -> None:
    request = tiny.request(PROMPTS[0], temperature=0.8, seed=3)
    expected = tiny.run(tiny.engine_for(MODEL), request)
    with two_ranks() as (runner, _, _):
        drafts = LocalProposer(tiny.drafter_for(MODEL))
        engine = tiny.engine_for(MODEL, runner=runner, proposer=drafts)
        assert tiny.run(engine, request) == expected
        assert engine.tally.accepted > 0


@pytest.mark.parametrize("quantized", [False, True])
def test_every_rank_holds_the_keys_and_values_of_every_entry(quantized: bool) -> None:
    with two_ranks() as (runner, first_rank, other):
        engine = tiny.engine_for(MODEL, runner=runner, quantized=quantized, depth=1)
        first = tiny.request(PROMPTS[1], "a", "s", ctx_size=48, n_keep=4)
        tiny.run(engine, first)
        tiny.run(engine, tiny.request((*PROMPTS[1][:36], *PROMPTS[0]), "b", "t"))
        runner.leader.gather(max(first_rank.entries), slice(0, 0))  # by then the other is as far
        assert first_rank.entries.keys() == other.entries.keys() and len(other.entries) == 2
        for number, entry in other.entries.items():
            here, there = first_rank.entries[number].tensors, entry.tensors
            for ours, theirs in zip(here, there, strict=True):
                assert torch.equal(ours[:, :, :32], theirs[:, :, :32])


def test_an_export_has_the_heads_of_all_ranks() -> None:
    alone = tiny.engine_for(MODEL, depth=1)
    tiny.run(alone, tiny.request(PROMPTS[1], "a", "s"))
    expected = alone.kv.export_session("s")
    with two_ranks() as (runner, _, _):
        engine = tiny.engine_for(MODEL, runner=runner, depth=1)
        tiny.run(engine, tiny.request(PROMPTS[1], "a", "s"))
        found = engine.kv.export_session("s")
    assert found is not None and expected is not None
    torch.testing.assert_close(found.keys, expected.keys)
    torch.testing.assert_close(found.values, expected.values)


def test_what_is_imported_is_exported_again_as_it_was() -> None:
    alone = tiny.engine_for(MODEL, depth=1)
    tiny.run(alone, tiny.request(PROMPTS[1], "a", "s"))
    export = alone.kv.export_session("s")
    assert export is not None
    with two_ranks() as (runner, _, _):
        kv = tiny.kv_for(runner)
        assert kv.import_session(export)
        assert kv.match((*export.token_ids.tolist(), 7), "s") == len(export.token_ids)
        again = kv.export_session("s")
        kv.check()
    assert again is not None
    assert torch.equal(again.keys, export.keys) and torch.equal(again.values, export.values)


def test_what_is_dropped_is_freed_on_every_rank() -> None:
    with two_ranks() as (runner, _, other):
        kv = tiny.kv_for(runner, 256)
        for number in range(3):
            entry = kv.reserve(tiny.prompt(20, seed=number), 100)
            assert entry is not None
            kv.append(entry, tiny.prompt(20, seed=number))
            kv.release(entry)
        assert kv.evict(256)
        last = kv.reserve(PROMPTS[0], 50)
        assert last is not None
        kv.check()
        runner.leader.gather(plan.number_of(last), slice(0, 0))
        assert list(other.entries) == [plan.number_of(last)]


def test_a_rank_that_is_gone_is_noticed_and_named() -> None:
    leader = Leader.open(SETTINGS)
    meeting = leader.meeting
    thread = threading.Thread(
        target=lambda: channel.connect(meeting.host, meeting.plan_port, bytes.fromhex(meeting.key), 1).close()
    )
    thread.start()
    leader.join()
    thread.join()
    leader.lead(Share(tiny.ours(MODEL)), [range(2), range(2)])
    with pytest.raises(EngineError, match="rank 1"):
        while True:
            leader.do(plan.Op.OPEN, 1, 64, 64, False)
    leader.close()


def test_draws_say_what_a_device_needs_and_no_history() -> None:
    rows = Rows(SamplingParams(temperature=0.5, top_k=3, seed=2**63 + 1), 4, list(range(10)), (1, 2, 3), count=3)
    said = plan.unpacked(plan.packed(plan.draws_said([rows])))
    heard = plan.draws_heard(said)[0]
    assert list(heard.positions) == list(rows.positions)
    assert (heard.params.seed, heard.params.temperature, heard.params.top_k) == (2**63 + 1, 0.5, 3)
    assert len(plan.packed(said)) < 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_cross_as_they_are(dtype: torch.dtype) -> None:
    tensors = [torch.arange(24).to(dtype).view(2, 3, 4), torch.empty((1, 0, 2), dtype=dtype)]
    frames = [bytearray(frame) for frame in plan.tensors_said(tensors)]
    for found, expected in zip(plan.tensors_heard(frames), tensors, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_who_does_not_know_the_key_is_no_rank() -> None:
    listener = channel.listen("127.0.0.1")
    found: list[object] = []
    accepting = threading.Thread(target=lambda: found.append(channel.accept(listener, KEY, [1], 10)))
    accepting.start()
    with pytest.raises(EngineError, match="is not this replica's rank 0"):
        channel.connect("127.0.0.1", listener.getsockname()[1], bytes(31) + b"1", 1)
    accepting.join()
    listener.close()
    assert found == [None]


def test_what_listens_without_the_key_is_no_leader() -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = server.accept()
        connection.sendall(bytes(channel.PROOF))
        connection.recv(1000)
        connection.sendall(bytes(channel.PROOF))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(EngineError, match="is not this replica's rank 0"):
        channel.connect("127.0.0.1", server.getsockname()[1], KEY, 1)
    thread.join()
    server.close()
