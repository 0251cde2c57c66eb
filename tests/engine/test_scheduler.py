"""Who runs when: priorities, preemption, shared prefixes, the prefill share, cancellation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.engine.engine import Engine
from paceline.errors import InvalidRequest
from paceline.speculation.local import LocalProposer
from paceline.types import Request
from tests import tiny
from tests.engine.counting import CountingRunner

MODEL = tiny.tiny_llama()
LONG = tiny.tiny_llama(max_position_embeddings=2048)


def ask(name: str, length: int = 20, *, priority: int = 0, **params: object) -> Request:
    return replace(tiny.request(tiny.prompt(length, seed=sum(name.encode())), name, **params), priority=priority)


def finishing_order(engine: Engine) -> list[str]:
    return [name for name, delta in tiny.deltas(engine) if delta.finished]


def running(engine: Engine) -> set[str]:
    return {sequence.request.request_id for sequence in engine._scheduler.running}


def test_equal_priorities_finish_in_order_of_arrival() -> None:
    engine = tiny.engine_for(MODEL, max_num_seqs=1)
    for name in "abc":
        engine.add(ask(name, max_tokens=3))
    assert finishing_order(engine) == ["a", "b", "c"]


def test_a_lower_priority_value_goes_first() -> None:
    engine = tiny.engine_for(MODEL, max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", -1)):
        engine.add(ask(name, priority=priority, max_tokens=3))
    assert finishing_order(engine) == ["c", "b", "a"]


def test_a_priority_must_be_an_integer() -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        replace(ask("a"), priority=1.5)  # type: ignore[arg-type]


def test_a_more_urgent_request_takes_the_slot_of_a_less_urgent_one() -> None:
    engine = tiny.engine_for(MODEL, max_num_seqs=1)
    engine.add(ask("batch", priority=1))
    engine.step()
    engine.add(ask("urgent", priority=0))
    engine.step()
    assert running(engine) == {"urgent"}


def test_a_more_urgent_request_takes_the_kv_of_the_youngest_least_urgent_one() -> None:
    engine = tiny.engine_for(MODEL, capacity=300)
    for name, priority in (("a", 2), ("b", 2), ("c", 1)):
        engine.add(ask(name, 60, priority=priority, max_tokens=30))
    engine.step()
    engine.add(ask("urgent", 60, max_tokens=30))
    engine.step()
    assert running(engine) == {"a", "c", "urgent"}


def test_nobody_yields_for_a_request_that_would_not_fit_anyway() -> None:
    engine = tiny.engine_for(MODEL, capacity=300)
    engine.add(ask("first", 100, priority=0, max_tokens=100))
    engine.add(ask("batch", 20, priority=2, max_tokens=30))
    engine.step()
    engine.add(ask("urgent", 200, priority=1, max_tokens=30))
    engine.step()
    assert running(engine) == {"first", "batch"}


def test_a_preempted_request_keeps_its_tokens() -> None:
    alone = tiny.run(tiny.engine_for(MODEL), ask("batch", temperature=0.9, seed=5))
    engine = tiny.engine_for(MODEL, max_num_seqs=1)
    engine.add(ask("batch", priority=1, temperature=0.9, seed=5))
    found = dict(engine.step())["batch"].token_ids
    assert (*found, *tiny.run(engine, ask("urgent"))["batch"]) == tuple(alone["batch"])


def test_small_requests_do_not_starve_a_big_one() -> None:
    engine = tiny.engine_for(MODEL, capacity=300)
    for n in range(3):
        engine.add(ask(f"small{n}", max_tokens=20))
    engine.step()
    engine.add(ask("big", 250, max_tokens=20))
    order = []
    for n in range(3, 60):  # small ones never cease
        engine.add(ask(f"small{n}", max_tokens=20))
        order += [name for name, delta in engine.step().items() if delta.finished]
    assert "big" in order and "small3" not in order[: order.index("big")]


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    engine = tiny.engine_for(MODEL, max_batched_tokens=128, max_prefill_while_decoding=16)
    engine.add(ask("stream", max_tokens=40))
    engine.step()
    engine.add(ask("long", 400, max_tokens=1))
    assert all("stream" in engine.step() for _ in range(25))


def test_prompts_share_a_bounded_part_of_a_step_in_which_a_stream_runs() -> None:
    runner = CountingRunner(MODEL)
    engine = tiny.engine_for(MODEL, runner=runner, max_batched_tokens=128, max_prefill_while_decoding=16)
    engine.add(ask("stream"))
    engine.step()
    engine.add(ask("a", 10))
    engine.add(ask("b", 40))
    engine.add(ask("c", 40))
    engine.step()
    engine.step()
    assert runner.steps[1:] == [[1, 10, 6], [1, 1, 16]]


def test_the_share_is_not_bounded_while_no_stream_runs() -> None:
    runner = CountingRunner(MODEL)
    engine = tiny.engine_for(MODEL, runner=runner, max_batched_tokens=128, max_prefill_while_decoding=16)
    engine.add(ask("a", 100))
    engine.add(ask("b", 100))
    engine.step()
    assert runner.steps == [[100, 28]]


def test_every_stream_gets_its_token_before_any_candidate() -> None:
    proposer = LocalProposer(tiny.drafter_for(MODEL))
    engine = tiny.engine_for(MODEL, max_batched_tokens=5, proposer=proposer)
    for name in "abcd":
        engine.add(ask(name, 1))
    engine.step()
    assert len(engine.step()) == 4


@pytest.mark.parametrize("session", [None, "own"], ids=["anonymous", "sessions"])
def test_a_shared_system_prompt_is_computed_once(session: str | None) -> None:
    runner, system, rest, outputs = CountingRunner(LONG), tiny.prompt(1000), 20, 5
    engine = tiny.engine_for(LONG, capacity=20_000, runner=runner, max_batched_tokens=512)
    many = [
        tiny.request((*system, *tiny.prompt(rest, seed=n)), str(n), session and f"{session}{n}", max_tokens=outputs)
        for n in range(1, 9)
    ]
    tiny.run(engine, *many)
    # The last token drawn is never fed back.
    assert runner.tokens == 1000 + 8 * (rest + outputs - 1)


def test_waiting_for_a_shared_prefix_changes_no_token() -> None:
    system = tiny.prompt(200)
    many = [tiny.request((*system, *tiny.prompt(9, seed=n)), str(n)) for n in range(1, 5)]
    found = tiny.run(tiny.engine_for(MODEL), *many)
    assert [found[each.request_id] for each in many] == [tiny.generate(MODEL, each.token_ids) for each in many]


def test_others_pass_a_request_that_waits_for_a_shared_prefix() -> None:
    engine = tiny.engine_for(MODEL)
    system = tiny.prompt(300)
    for name, seed in (("leader", 1), ("follower", 2)):
        engine.add(tiny.request((*system, *tiny.prompt(9, seed=seed)), name))
    engine.add(ask("other"))
    engine.step()
    assert running(engine) == {"leader", "other"}


def test_a_follower_goes_on_when_its_leader_is_cancelled() -> None:
    runner = CountingRunner(MODEL)
    engine = tiny.engine_for(MODEL, runner=runner)
    system = tiny.prompt(300)
    for name, seed in (("leader", 1), ("follower", 2)):
        engine.add(tiny.request((*system, *tiny.prompt(9, seed=seed)), name, max_tokens=1))
    engine.step()
    engine.abort("leader")
    tiny.finish(engine)
    # What the leader had computed is not lost.
    assert runner.tokens == 309


@pytest.mark.parametrize("steps", range(9), ids=lambda n: f"after {n} steps")
def test_a_cancelled_request_leaves_nothing_behind(steps: int) -> None:
    drafter = tiny.drafter_for(MODEL)
    engine = tiny.engine_for(MODEL, max_num_seqs=1, max_batched_tokens=16, proposer=LocalProposer(drafter))
    engine.add(ask("a", 40, max_tokens=9))
    engine.add(ask("b", 40, max_tokens=9))
    for _ in range(steps):
        engine.step()
    for name in "ab":
        engine.abort(name)
    engine.check()
    left = (engine.has_work, engine.num_waiting, engine.num_running, engine.kv.usage().in_use, drafter.num_sequences)
    assert left == (False, 0, 0, 0, 0)
    assert drafter.kv.usage().in_use == 0
