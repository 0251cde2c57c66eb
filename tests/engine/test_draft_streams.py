"""Several targets' streams over one drafter, without a thread: whose sequence is whose, and for how long."""

from __future__ import annotations

import pytest

from paceline.engine.draft_streams import HEARTBEAT_S, IDLE_S, SWEEP_S, DraftStreams
from paceline.engine.drafter import Drafter
from paceline.errors import DraftError
from paceline.speculation.frames import Advance, Candidates, DraftFailureReason, DraftFrame, Open
from paceline.types import SamplingParams
from tests import tiny

MODEL = tiny.tiny_llama(num_hidden_layers=1)
PROMPT = tiny.prompt(30)
GREEDY = SamplingParams(temperature=0.0)


class Setup:
    def __init__(self, budget: int = 64) -> None:
        self.now = 0.0
        runner = tiny.ours(MODEL)
        drafter = Drafter(runner, tiny.kv_for(runner), max_batched_tokens=budget, max_model_len=512)
        self.streams = DraftStreams(drafter, lambda: self.now)
        self.streams.connect("t")

    def open(self, sequence: int = 1, depth: int = 0, stream: str = "t") -> None:
        opened = Open(sequence, PROMPT, GREEDY, depth, len(PROMPT))
        self.streams.apply(stream, DraftFrame(opens=(opened,)))

    def drain(self) -> dict[str, list[Candidates]]:
        told: dict[str, list[Candidates]] = {}
        while self.streams.has_work:
            for stream, replies in self.streams.step().items():
                told.setdefault(stream, []).extend(replies)
        return told


def test_each_stream_hears_of_its_own_sequences() -> None:
    setup = Setup()
    setup.streams.connect("u")
    setup.open(1)
    setup.open(1, stream="u")
    assert setup.drain() == {"t": [Candidates(1, 30)], "u": [Candidates(1, 30)]}


def test_a_long_prefill_is_heard_of() -> None:
    setup = Setup(budget=8)
    setup.open()
    setup.now = HEARTBEAT_S
    assert setup.streams.step() == {"t": []}


def test_a_stream_that_waits_for_nothing_hears_nothing() -> None:
    setup = Setup()
    setup.open()
    setup.drain()
    setup.streams.connect("u")
    setup.open(1, depth=2, stream="u")
    setup.now = HEARTBEAT_S
    assert setup.drain().keys() == {"u"}


def test_a_stream_s_end_frees_its_sequences() -> None:
    setup = Setup()
    setup.open(1)
    setup.open(2)
    setup.drain()
    setup.streams.disconnect("t")
    drafter = setup.streams.drafter
    assert (drafter.num_sequences, drafter.kv.usage().in_use) == (0, 0)


def test_a_sequence_that_is_not_mentioned_any_more_is_forgotten() -> None:
    setup = Setup()
    setup.open()
    setup.drain()
    setup.now = IDLE_S + SWEEP_S
    setup.streams.apply("t", DraftFrame())
    assert setup.streams.drafter.num_sequences == 0


def test_a_sequence_that_is_mentioned_stays() -> None:
    setup = Setup()
    setup.open()
    for n in range(4):
        setup.now += IDLE_S / 2
        setup.streams.apply("t", DraftFrame(advances=(Advance(1, 30 + n, (5,), 0),)))
    assert setup.streams.drafter.num_sequences == 1


def test_a_forgotten_sequence_is_unknown() -> None:
    setup = Setup()
    setup.open()
    setup.drain()
    setup.now = IDLE_S + SWEEP_S
    setup.streams.apply("t", DraftFrame())
    setup.streams.apply("t", DraftFrame(advances=(Advance(1, 30, (5,), 4),)))
    assert setup.drain() == {"t": [Candidates(1, 30, failure=DraftFailureReason.UNKNOWN_SEQUENCE)]}


def test_a_stream_that_is_not_connected_is_refused() -> None:
    with pytest.raises(DraftError, match="nobody"):
        Setup().streams.apply("nobody", DraftFrame())
