"""One thread owns the device: what others hand it happens in order, and whoever waits is told how it ended."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from paceline.engine.loop import DrafterLoop, EngineLoop
from paceline.errors import DraftError, EngineError, InvalidRequest, Unavailable
from paceline.speculation.frames import Advance, Candidates, DraftFailureReason, DraftFrame, Open
from paceline.speculation.grammar import Grammars
from paceline.types import Delta, Failure, FinishReason, Grammar, Request, SamplingParams
from tests import schemas, tiny

MODEL = tiny.tiny_llama()
PROMPT = tiny.prompt(9)
GREEDY = SamplingParams(temperature=0.0)
PATIENCE_S = 60.0


class Listener:
    """A sink that keeps what it hears and knows when it is over."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.heard: list[Delta | Failure] = []
        self.over = threading.Event()
        self._then = then

    def __call__(self, frame: Delta | Failure) -> None:
        self.heard.append(frame)
        self._then()
        if isinstance(frame, Failure) or frame.finished:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        assert self.over.wait(PATIENCE_S)
        return [token for frame in self.heard if isinstance(frame, Delta) for token in frame.token_ids]

    @property
    def failure(self) -> Failure:
        assert self.over.wait(PATIENCE_S)
        (found,) = [frame for frame in self.heard if isinstance(frame, Failure)]
        return found


class Gate:
    """Holds the thread of a loop between two steps until it is opened."""

    def __init__(self, loop: EngineLoop | DrafterLoop) -> None:
        self._open, reached = threading.Event(), threading.Event()
        loop.call(lambda: (reached.set(), self._open.wait(PATIENCE_S)))
        assert reached.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


def ended(loop: EngineLoop | DrafterLoop) -> None:
    """Wait until its thread is gone."""
    loop._thread._thread.join(PATIENCE_S)


@pytest.fixture
def loop() -> Iterator[EngineLoop]:
    made = EngineLoop(tiny.engine_for(MODEL))
    yield made
    made.stop()


@pytest.fixture
def drafting() -> Iterator[DrafterLoop]:
    made = DrafterLoop(tiny.drafter_for(MODEL))
    yield made
    made.stop()


def request(name: str = "r", **params: Any) -> Request:
    return tiny.request(PROMPT, name, **params)


def break_step(loop: EngineLoop | DrafterLoop) -> None:
    """The next step raises something that nobody outside may read."""
    owner = loop.engine if isinstance(loop, EngineLoop) else loop.drafter

    def step() -> None:
        raise RuntimeError("secret")

    owner.step = step  # type: ignore[method-assign, assignment]


# Requests.


def test_deltas_arrive_in_order(loop: EngineLoop) -> None:
    listener = Listener()
    loop.submit(request(), listener)
    assert listener.tokens == tiny.generate(MODEL, PROMPT)


def test_the_last_delta_is_the_finished_one(loop: EngineLoop) -> None:
    listener = Listener()
    loop.submit(request(), listener)
    assert listener.over.wait(PATIENCE_S)
    assert [frame.finished for frame in listener.heard if isinstance(frame, Delta)] == [False] * 23 + [True]


def test_a_submission_resolves_once_it_is_queued(loop: EngineLoop) -> None:
    assert loop.submit(request(), Listener()).result(PATIENCE_S) is None


def test_a_refused_submission_raises_its_reason(loop: EngineLoop) -> None:
    with pytest.raises(InvalidRequest, match="do not fit"):
        loop.submit(tiny.request(tiny.prompt(600)), Listener()).result(PATIENCE_S)


def test_a_refused_duplicate_leaves_the_first_its_listener(loop: EngineLoop) -> None:
    first, second = Listener(), Listener()
    gate = Gate(loop)
    loop.submit(request(), first)
    refused = loop.submit(request(), second)
    gate.open()
    assert isinstance(refused.exception(PATIENCE_S), InvalidRequest)
    assert (len(first.tokens), second.heard) == (24, [])


def test_a_refusal_harms_no_other_request(loop: EngineLoop) -> None:
    listener = Listener()
    loop.submit(tiny.request(tiny.prompt(600), "bad"), Listener())
    loop.submit(request(), listener)
    assert len(listener.tokens) == 24


def test_a_submission_cancelled_in_time_never_runs(loop: EngineLoop) -> None:
    gate, listener = Gate(loop), Listener()
    future = loop.submit(request(), listener)
    cancelled = future.cancel()
    gate.open()
    loop.call(lambda: None).result(PATIENCE_S)
    assert (cancelled, loop.engine.has_work, listener.heard) == (True, False, [])
    with pytest.raises(CancelledError):
        future.result(PATIENCE_S)


def test_an_aborted_request_hears_no_more(loop: EngineLoop) -> None:
    listener = Listener(then=lambda: loop.abort("r"))
    loop.submit(request(), listener)
    other = Listener()
    loop.submit(request("other"), other)
    assert (len(other.tokens), len(listener.heard)) == (24, 1)


def test_an_aborted_request_frees_its_room(loop: EngineLoop) -> None:
    gone = threading.Event()
    listener = Listener(then=lambda: loop.abort("r").add_done_callback(lambda _: gone.set()))
    loop.submit(request(), listener)
    assert gone.wait(PATIENCE_S)
    assert (loop.engine.has_work, loop.engine.kv.usage().in_use) == (False, 0)


def test_aborting_an_unknown_request_is_nothing(loop: EngineLoop) -> None:
    assert loop.abort("nobody").result(PATIENCE_S) is None


def test_requests_submitted_from_many_threads_all_finish(loop: EngineLoop) -> None:
    listeners = {str(n): Listener() for n in range(24)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: loop.submit(request(name, max_tokens=6), listeners[name]), listeners))
    assert [listener.tokens for listener in listeners.values()] == [tiny.generate(MODEL, PROMPT, 6)] * 24


def test_a_listener_that_raises_ends_its_own_request_only(loop: EngineLoop) -> None:
    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    other, gate = Listener(), Gate(loop)
    loop.submit(request("bad"), Listener(then=fail))
    loop.submit(request(), other)
    gate.open()
    assert (len(other.tokens), loop.engine.has_work, loop.healthy) == (24, False, True)


# Calls.


def test_a_call_runs_in_the_thread_and_returns(loop: EngineLoop) -> None:
    assert loop.call(lambda: threading.current_thread().name).result(PATIENCE_S) == "engine"


def test_a_call_that_raises_tells_its_caller(loop: EngineLoop) -> None:
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0).result(PATIENCE_S)


def test_a_call_that_raises_leaves_the_thread_healthy(loop: EngineLoop) -> None:
    loop.call(lambda: 1 // 0).exception(PATIENCE_S)
    assert loop.call(lambda: loop.healthy).result(PATIENCE_S) is True


# The end.


def test_stopping_ends_requests_with_an_error(loop: EngineLoop) -> None:
    listener = Listener(then=lambda: stopping.set())
    stopping = threading.Event()
    loop.submit(request(max_tokens=480), listener)
    assert stopping.wait(PATIENCE_S)
    loop.stop()
    assert listener.failure == Failure.of(Unavailable("the replica is shutting down"))


def test_stopping_twice_is_stopping(loop: EngineLoop) -> None:
    loop.stop()
    loop.stop()
    assert loop.healthy is False


def test_stopping_from_the_thread_itself_ends_it(loop: EngineLoop) -> None:
    loop.call(loop.stop).result(PATIENCE_S)
    ended(loop)
    assert loop.healthy is False


def test_a_call_after_the_stop_is_refused(loop: EngineLoop) -> None:
    loop.stop()
    with pytest.raises(Unavailable):
        loop.submit(request(), Listener()).result(0)


def test_a_failing_step_fails_every_request_and_says_nothing_of_the_inside(loop: EngineLoop) -> None:
    listeners, gate = [Listener(), Listener()], Gate(loop)
    for n, listener in enumerate(listeners):
        loop.submit(request(str(n)), listener)
    loop.call(lambda: break_step(loop))
    gate.open()
    expected = Failure.of(EngineError("the engine failed while serving this request"))
    assert [listener.failure for listener in listeners] == [expected, expected]


def test_a_failing_step_is_in_the_log(loop: EngineLoop, caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    break_step(loop)
    with caplog.at_level(logging.ERROR):
        loop.submit(request(), listener)
        ended(loop)
    assert "secret" in caplog.text


def test_a_failing_step_makes_it_unhealthy(loop: EngineLoop) -> None:
    break_step(loop)
    loop.submit(request(), Listener())
    ended(loop)
    assert loop.healthy is False


def test_a_call_after_a_failing_step_is_refused(loop: EngineLoop) -> None:
    break_step(loop)
    loop.submit(request(), Listener())
    ended(loop)
    with pytest.raises(Unavailable):
        loop.call(lambda: None).result(0)


def test_a_call_left_while_the_failing_step_ran_is_refused(loop: EngineLoop) -> None:
    running, go_on = threading.Event(), threading.Event()

    def step() -> None:
        running.set()
        go_on.wait(PATIENCE_S)
        raise RuntimeError("secret")

    loop.engine.step = step  # type: ignore[method-assign, assignment]
    loop.submit(request(), Listener())
    assert running.wait(PATIENCE_S)
    left = loop.call(lambda: None)
    go_on.set()
    assert isinstance(left.exception(PATIENCE_S), EngineError)


def test_a_listener_that_raises_does_not_keep_others_from_hearing_of_the_end(loop: EngineLoop) -> None:
    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    other, gate = Listener(), Gate(loop)
    loop.submit(request("bad"), Listener(then=fail))
    loop.submit(request(), other)
    loop.call(lambda: break_step(loop))
    gate.open()
    assert other.failure.code == EngineError.code


# The drafter's.


class Stream:
    """A sink for one stream; `next` waits for what comes."""

    def __init__(self) -> None:
        self.heard: list[Candidates] = []
        self._more = threading.Condition()

    def __call__(self, ready: list[Candidates]) -> None:
        with self._more:
            self.heard += ready
            self._more.notify_all()

    def wait(self, n: int = 1) -> list[Candidates]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.heard) >= n, PATIENCE_S)
            return self.heard


def opening(*sequences: int, depth: int = 3) -> DraftFrame:
    return DraftFrame(opens=tuple(Open(sequence, PROMPT, GREEDY, depth, len(PROMPT)) for sequence in sequences))


def test_a_stream_gets_its_candidates(drafting: DrafterLoop) -> None:
    stream = Stream()
    drafting.connect("s", stream)
    drafting.apply("s", opening(1))
    assert stream.wait() == [Candidates(1, len(PROMPT), tuple(tiny.generate(MODEL, PROMPT, 3)))]


def test_an_advance_goes_on(drafting: DrafterLoop) -> None:
    stream, truth = Stream(), tuple(tiny.generate(MODEL, PROMPT, 6))
    drafting.connect("s", stream)
    drafting.apply("s", opening(1))
    drafting.apply("s", DraftFrame(advances=(Advance(1, len(PROMPT), truth[:1], 5),)))
    assert stream.wait()[-1] == Candidates(1, len(PROMPT) + 1, truth[1:])


def test_streams_may_use_the_same_numbers(drafting: DrafterLoop) -> None:
    one, two = Stream(), Stream()
    drafting.connect("one", one)
    drafting.connect("two", two)
    drafting.apply("one", opening(1))
    drafting.apply("two", DraftFrame(advances=(Advance(1, 5, (4,), 2),)))
    assert [stream.wait()[0].failure for stream in (one, two)] == [None, DraftFailureReason.UNKNOWN_SEQUENCE]


def test_a_close_frees_the_sequence(drafting: DrafterLoop) -> None:
    drafting.connect("s", Stream())
    drafting.apply("s", opening(1, 2))
    drafting.apply("s", DraftFrame(closes=(1,))).result(PATIENCE_S)
    assert drafting.drafter.num_sequences == 1


def test_closes_of_a_frame_come_before_its_opens(drafting: DrafterLoop) -> None:
    stream = Stream()
    drafting.connect("s", stream)
    drafting.apply("s", opening(1, depth=0))
    drafting.apply("s", DraftFrame(opens=opening(1).opens, closes=(1,)))
    assert stream.wait()[0].failure is None


def test_disconnecting_frees_the_streams_sequences_and_no_others(drafting: DrafterLoop) -> None:
    for name in ("one", "two"):
        drafting.connect(name, Stream())
        drafting.apply(name, opening(1, 2))
    drafting.disconnect("one").result(PATIENCE_S)
    assert drafting.drafter.num_sequences == 2


def test_disconnecting_leaves_no_keys_in_use(drafting: DrafterLoop) -> None:
    stream = Stream()
    drafting.connect("s", stream)
    drafting.apply("s", opening(1, 2))
    stream.wait(2)
    drafting.disconnect("s").result(PATIENCE_S)
    assert drafting.drafter.kv.usage().in_use == 0


def test_disconnecting_an_unknown_stream_is_nothing(drafting: DrafterLoop) -> None:
    assert drafting.disconnect("nobody").result(PATIENCE_S) is None


def test_a_frame_of_an_unknown_stream_is_refused(drafting: DrafterLoop) -> None:
    with pytest.raises(DraftError, match="nobody"):
        drafting.apply("nobody", opening(1)).result(PATIENCE_S)


def test_a_stream_that_raises_is_disconnected_and_others_go_on(drafting: DrafterLoop) -> None:
    def fail(ready: list[Candidates]) -> None:
        raise RuntimeError("Event loop is closed")

    other = Stream()
    drafting.connect("bad", fail)
    drafting.connect("s", other)
    drafting.apply("bad", opening(1))
    drafting.apply("s", opening(1))
    other.wait()
    assert drafting.call(lambda: drafting.drafter.num_sequences).result(PATIENCE_S) == 1


def test_a_failing_draft_step_makes_it_unhealthy(drafting: DrafterLoop) -> None:
    break_step(drafting)
    drafting.connect("s", Stream())
    drafting.apply("s", opening(1))
    ended(drafting)
    assert drafting.healthy is False


def test_a_frame_after_a_failing_draft_step_is_refused(drafting: DrafterLoop) -> None:
    break_step(drafting)
    drafting.connect("s", Stream())
    drafting.apply("s", opening(1))
    ended(drafting)
    with pytest.raises(Unavailable):
        drafting.apply("s", opening(2)).result(0)


# What nobody waits for any longer


def test_a_stuck_engine_that_is_abandoned_fails_its_requests_at_once(loop: EngineLoop) -> None:
    listener = Listener()
    loop.submit(request(max_tokens=400), listener).result(PATIENCE_S)
    gate = Gate(loop)
    loop.abandon(Unavailable("rank 1 was lost"))
    assert (listener.failure.code, listener.failure.message) == ("service_unavailable", "rank 1 was lost")
    gate.open()


def test_what_waits_for_a_stuck_engine_is_refused_when_it_is_abandoned(loop: EngineLoop) -> None:
    gate = Gate(loop)
    waiting = loop.submit(request(), Listener())
    loop.abandon(Unavailable("rank 1 was lost"))
    with pytest.raises(Unavailable, match="rank 1 was lost"):
        waiting.result(0)
    gate.open()


def test_an_abandoned_engine_takes_nothing_more_and_is_unhealthy(loop: EngineLoop) -> None:
    gate = Gate(loop)
    loop.abandon(Unavailable("rank 1 was lost"))
    with pytest.raises(Unavailable):
        loop.submit(request(), Listener()).result(0)
    assert not loop.healthy
    gate.open()


def test_an_abandoned_engine_is_not_closed_by_others(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[float] = []
    monkeypatch.setattr(loop.engine, "close", closed.append)
    gate = Gate(loop)
    loop.abandon(Unavailable("rank 1 was lost"))
    loop.stop()
    assert closed == []
    gate.open()


def test_an_abandoned_drafter_refuses_its_streams(drafting: DrafterLoop) -> None:
    gate = Gate(drafting)
    waiting = drafting.connect("s", lambda _: None)
    drafting.abandon(Unavailable("rank 1 was lost"))
    with pytest.raises(Unavailable, match="rank 1 was lost"):
        waiting.result(0)
    gate.open()


def test_an_ended_request_s_listener_hears_that_it_was_aborted(loop: EngineLoop) -> None:
    listener = Listener()
    gate = Gate(loop)
    loop.submit(request("r", n=2, seed=1, max_tokens=400), listener)
    ended = loop.end("r", 2)
    again = loop.end("r", 2)
    gate.open()
    assert (ended.result(PATIENCE_S), again.result(PATIENCE_S)) == (True, False)
    assert listener.heard == [Delta((), "", FinishReason.ABORT, index=index) for index in range(2)]
    assert loop.call(loop.engine.kv.usage).result(PATIENCE_S).in_use == 0


class SlowGrammars(Grammars):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(schemas.tokenizer().to_str(), schemas.EOS)
        self.asked, self.go = threading.Event(), threading.Event()

    def compile(self, grammar: Grammar) -> None:
        self.asked.set()
        assert self.go.wait(PATIENCE_S)
        super().compile(grammar)


BOUND = SamplingParams(seed=3, max_tokens=20, grammar=Grammar("regex", "[ab]{5}"))


@pytest.fixture
def compiling() -> Iterator[tuple[EngineLoop, SlowGrammars]]:
    engine = tiny.engine_for(tiny.tiny_llama(vocab_size=310), decoder=schemas.Text())
    grammars = engine.grammars = SlowGrammars()
    made = EngineLoop(engine)
    yield made, grammars
    grammars.go.set()
    made.stop()


def test_streams_run_while_a_grammar_is_compiled(compiling: tuple[EngineLoop, SlowGrammars]) -> None:
    loop, grammars = compiling
    bound, free = Listener(), Listener()
    queued = loop.submit(Request("bound", PROMPT, BOUND), bound)
    assert grammars.asked.wait(PATIENCE_S)
    loop.submit(Request("free", PROMPT, SamplingParams(temperature=0, max_tokens=5)), free).result(PATIENCE_S)
    assert (len(free.tokens), queued.done()) == (5, False)
    grammars.go.set()
    queued.result(PATIENCE_S)
    assert set(schemas.tokenizer().decode(bound.tokens)) <= {"a", "b"}


def test_a_request_cancelled_while_its_grammar_is_compiled_never_runs(
    compiling: tuple[EngineLoop, SlowGrammars],
) -> None:
    loop, grammars = compiling
    queued = loop.submit(Request("bound", PROMPT, BOUND), Listener())
    assert grammars.asked.wait(PATIENCE_S)
    assert queued.cancel()
    grammars.go.set()
    # The worker has one job after the other, and the device's thread takes what it hands over in order.
    loop.submit(Request("next", PROMPT, replace(BOUND, grammar=Grammar("regex", "c"))), Listener()).result(PATIENCE_S)
    assert loop.call(lambda: "bound" in loop.engine._by_request).result(PATIENCE_S) is False


def test_a_wrong_grammar_is_the_submitters_error(compiling: tuple[EngineLoop, SlowGrammars]) -> None:
    loop, grammars = compiling
    grammars.go.set()
    with pytest.raises(InvalidRequest, match="grammar"):
        loop.submit(Request("r", PROMPT, replace(BOUND, grammar=Grammar("regex", "("))), Listener()).result(PATIENCE_S)


def test_a_drafter_refuses_a_grammar_it_cannot_compile(drafting: DrafterLoop) -> None:
    heard: list[Candidates] = []
    drafting.connect("s", heard.extend).result(PATIENCE_S)
    drafting.apply("s", DraftFrame((Open(4, PROMPT, BOUND, 2, len(PROMPT)),))).result(PATIENCE_S)
    drafting.call(lambda: None).result(PATIENCE_S)
    drafting.stop()
    assert heard == [Candidates(4, len(PROMPT), failure=DraftFailureReason.UNSUPPORTED)]
