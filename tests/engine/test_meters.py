"""What replicas report of their last seconds is what happened in them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from paceline.autoscaling.snapshot import TargetLoad
from paceline.engine.drafter import Drafted, Drafter
from paceline.engine.engine import Engine
from paceline.engine.loop import DrafterLoop
from paceline.engine.meters import DrafterMeter, EngineMeter
from paceline.speculation.frames import DraftFrame, Open
from paceline.speculation.local import LocalProposer
from paceline.types import SamplingParams
from tests import tiny
from tests.engine.test_recent import Hand

MODEL = tiny.tiny_llama()
RUNNER = tiny.ours(MODEL)
PROMPT = tiny.prompt(40)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def hand() -> Hand:
    return Hand()


def metered(hand: Hand, **options: object) -> Engine:
    engine = tiny.engine_for(MODEL, runner=RUNNER, **options)  # type: ignore[arg-type]
    engine.meter = EngineMeter(engine, hand)
    return engine


def drafter() -> Drafter:
    return Drafter(RUNNER, tiny.kv_for(RUNNER), max_batched_tokens=64, max_model_len=512)


def run(engine: Engine, hand: Hand, steps: int, seconds: float = 0.5) -> None:
    """Steps of so many seconds."""
    for _ in range(steps):
        hand.now += seconds
        engine.step()


def load(engine: Engine) -> TargetLoad:
    return engine.meter.load("t")


def test_an_idle_engine_reports_zeros_and_no_quantiles(hand: Hand) -> None:
    engine = metered(hand)
    hand.now += 5.0
    seen = load(engine)
    assert (seen.running, seen.waiting, seen.busy, seen.kv_in_use, seen.queued_prefill_tokens) == (0, 0, 0, 0, 0)
    assert (seen.ttft_p95_s, seen.itl_p95_s, seen.prefill_tokens_per_s) == (None, None, None)


def test_running_is_a_mean_over_time(hand: Hand) -> None:
    engine = metered(hand)
    hand.now += 4.0
    for name in "abc":
        engine.add(tiny.request(PROMPT, name, max_tokens=100))
    engine.step()
    hand.now += 4.0
    assert load(engine).running == pytest.approx(1.5)


def test_one_that_does_not_fit_waits(hand: Hand) -> None:
    engine = metered(hand, max_num_seqs=1)
    engine.add(tiny.request(PROMPT, "a", max_tokens=100))
    engine.add(tiny.request(tiny.prompt(30, seed=9), "b", max_tokens=100))
    run(engine, hand, 8)
    seen = load(engine)
    assert (seen.waiting, seen.queued_prefill_tokens) == (pytest.approx(1.0, abs=0.2), 30)


def test_an_aborted_request_runs_no_longer(hand: Hand) -> None:
    engine = metered(hand)
    engine.add(tiny.request(PROMPT, "a", max_tokens=100))
    engine.step()
    engine.abort("a")
    hand.now += 20.0
    assert load(engine).running == 0.0


def test_arrivals_are_requests_and_prompt_tokens_without_kv(hand: Hand) -> None:
    engine = metered(hand)
    tiny.run(engine, tiny.request(PROMPT, "a", max_tokens=4))
    hand.now += 20.0
    engine.add(tiny.request([*PROMPT, *tiny.prompt(24, seed=3)], "b", max_tokens=4))
    hand.now += 4.0
    seen = load(engine)
    assert seen.requests_per_s is not None and seen.prompt_tokens_per_s is not None
    # The window is nine to ten seconds long, and not all of the first prompt may be held.
    assert 0.1 <= seen.requests_per_s <= 1 / 9
    assert 24 <= round(seen.prompt_tokens_per_s / seen.requests_per_s) < 24 + len(PROMPT) // 2


def test_a_prompt_being_computed_counts_as_queued(hand: Hand) -> None:
    engine = metered(hand, max_batched_tokens=16)
    engine.add(tiny.request(PROMPT, "a", max_tokens=4))
    engine.step()
    assert load(engine).queued_prefill_tokens == len(PROMPT) - 16


def test_a_step_under_way_need_not_be_waited_for(hand: Hand) -> None:
    """What is asked while a first long step runs is of the time until now."""
    engine = metered(hand)
    engine.add(tiny.request(PROMPT, "a", max_tokens=100))
    seen = list[TargetLoad]()

    def in_the_middle() -> float:
        hand.now += 8.0
        seen.append(load(engine))
        return 0.0

    engine.telemetry.clock = in_the_middle  # read between sampling and emitting
    engine.step()
    assert seen[0].waiting == pytest.approx(1.0)


def test_output_tokens_are_those_of_the_deltas(hand: Hand) -> None:
    engine = metered(hand)
    engine.add(tiny.request(PROMPT, "a", max_tokens=8, ignore_eos=True))
    hand.now += 4.0
    while engine.has_work:
        engine.step()
    assert load(engine).output_tokens_per_s == pytest.approx(8 / 4.0)


def test_kv_in_use_is_the_share_of_running_sequences(hand: Hand) -> None:
    engine = metered(hand)
    engine.add(tiny.request(PROMPT, "a", max_tokens=100))
    engine.step()
    hand.now += 20.0
    usage = engine.kv.usage()
    assert load(engine).kv_in_use == pytest.approx(usage.in_use / usage.total)


def test_quantiles_follow_the_requests() -> None:
    hand = Hand()
    engine = tiny.engine_for(MODEL, runner=RUNNER, engine_clock=hand)
    engine.meter = EngineMeter(engine, hand)
    engine.add(tiny.request(PROMPT, "a", max_tokens=5, ignore_eos=True))
    hand.now += 2.0
    engine.step()
    for _ in range(4):
        hand.now += 0.25
        engine.step()
    seen = load(engine)
    assert (seen.ttft_p95_s, seen.itl_p95_s) == (pytest.approx(2.0, rel=0.03), pytest.approx(0.25, rel=0.03))


def test_without_drafts_nothing_is_said_of_them(hand: Hand) -> None:
    seen = load(metered(hand))
    assert (seen.drafts_wanted, seen.draft_tokens_wanted_per_s, seen.draft_late, seen.draft_saved) == (None,) * 4


def test_drafts_asked_for_are_reported(hand: Hand) -> None:
    engine = metered(hand, proposer=LocalProposer(drafter()), depth=3)
    engine.add(tiny.request(PROMPT, "a", max_tokens=100))
    engine.add(replace(tiny.request(PROMPT, "b", max_tokens=100), speculate=False))
    run(engine, hand, 2, seconds=0.25)
    hand.now += 20.0
    run(engine, hand, 2)
    seen = load(engine)
    assert seen.drafts_wanted == pytest.approx(1.0)
    assert seen.draft_tokens_wanted_per_s is not None
    assert seen.draft_tokens_wanted_per_s * 10 == pytest.approx(2 * 3, rel=0.12)
    assert seen.draft_late == 0.0


def test_a_fixed_depth_says_nothing_of_what_drafts_save(hand: Hand) -> None:
    assert load(metered(hand, proposer=LocalProposer(drafter()), depth=3)).draft_saved is None


def test_what_drafts_save_is_a_share_of_the_time(hand: Hand) -> None:
    engine = metered(hand, proposer=LocalProposer(drafter()), depth="auto")
    assert engine.speculator is not None and engine.speculator.policy.gain is not None
    engine.speculator.policy.gain.saved_s = 3.0
    engine.meter.stepped(0.1)
    hand.now += 5.0
    assert load(engine).draft_saved == pytest.approx(3.0 / 5.0)


def test_seats_follow_the_measured_steps(hand: Hand) -> None:
    engine = metered(hand, proposer=LocalProposer(drafter()), depth="auto", max_num_seqs=64)
    cost = tiny.flat_cost()
    within = (cost.seconds(20, 20) + cost.seconds(21, 21)) / 2
    assert (engine.meter.seats(within), engine.meter.seats(1e-6), engine.meter.seats(9.0)) == (20, 1, 64)


def test_where_steps_were_not_measured_all_may_run(hand: Hand) -> None:
    assert metered(hand, max_num_seqs=5).meter.seats(0.01) == 5


def test_a_drafter_is_busy_while_it_steps(hand: Hand) -> None:
    meter = DrafterMeter(drafter(), hand)

    def step() -> None:
        hand.now += 2.0

    meter.time(step)
    hand.now += 3.0
    assert meter.busy_s == 2.0
    assert meter.load("d").busy == pytest.approx(2.0 / 5.0)


def test_a_drafters_tokens_and_sequences_are_reported(hand: Hand) -> None:
    drafting, drafted = drafter(), list[Drafted]()
    meter = DrafterMeter(drafting, hand)
    drafting.open("s", PROMPT, GREEDY, depth=4)
    while drafting.has_work:
        meter.time(lambda: drafted.extend(drafting.step()))
    hand.now += 2.0
    seen = meter.load("d")
    assert (seen.tokens_per_s, seen.sequences) == (pytest.approx(4 / 2.0), 1)


def test_the_drafters_thread_is_timed() -> None:
    loop, answered = DrafterLoop(drafter()), threading.Event()
    try:
        loop.connect("t", lambda replies: answered.set() if replies else None).result(10)
        frame = DraftFrame(opens=(Open(1, tuple(PROMPT), GREEDY, 4, len(PROMPT), 0, rejection=False),))
        loop.apply("t", frame).result(10)
        assert answered.wait(10)
        assert loop.call(lambda: loop.meter.busy_s).result(10) > 0
    finally:
        loop.stop()


def test_numbers_survive_the_way_to_the_policy(hand: Hand) -> None:
    engine = metered(hand)
    hand.now += 1.0
    seen = load(engine)
    assert TargetLoad.of("t", seen.numbers()) == seen
