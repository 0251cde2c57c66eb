"""What may wait is bounded by the prompt tokens it holds, and who is refused is told how long that will take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.backlog import Backlog
from paceline.engine.engine import Engine
from paceline.errors import EngineError, Overloaded
from tests import tiny

MODEL = tiny.tiny_llama(num_hidden_layers=1, hidden_size=24, num_attention_heads=4, num_key_value_heads=2)


def engine(limit: int | None = 100) -> Engine:
    return tiny.engine_for(MODEL, max_num_seqs=1, max_queued_prefill_tokens=limit)


def busy(limit: int | None = 100) -> Engine:
    """One runs, one of 60 tokens waits."""
    made = engine(limit)
    made.add(tiny.request(tiny.prompt(20), "running"))
    made.step()
    made.add(tiny.request(tiny.prompt(60, seed=1), "waiting"))
    return made


def test_a_prompt_that_would_be_too_much_is_refused_before_it_queues() -> None:
    made = busy()
    made.add(tiny.request(tiny.prompt(40, seed=2), "fits"))
    with pytest.raises(Overloaded, match="100 prompt tokens are waiting already, and at most 100 may") as refused:
        made.add(tiny.request(tiny.prompt(9, seed=3), "beyond"))
    assert refused.value.retry_after
    assert (made.num_waiting, made.queued_prefill_tokens) == (2, 100)
    made.check()


def test_all_outputs_of_a_request_cost_one_prompt() -> None:
    made = tiny.engine_for(MODEL, max_num_seqs=4, max_queued_prefill_tokens=100)
    made.add_all(tiny.request(tiny.prompt(60), "r", n=4, seed=1).choices())
    assert made.queued_prefill_tokens == 63


def test_a_long_prompt_is_let_in_if_nobody_waits() -> None:
    made = engine(100)
    made.add(tiny.request(tiny.prompt(20), "running"))
    made.step()
    made.add(tiny.request(tiny.prompt(300, seed=1), "long"))
    assert made.queued_prefill_tokens == 300


def test_what_the_session_s_kv_holds_does_not_count() -> None:
    made = engine(100)
    tokens = tiny.prompt(60)
    first = tiny.run(made, tiny.request(tokens, "first", "s"))["first"]
    made.add(tiny.request(tiny.prompt(20, seed=1), "running"))
    made.step()
    made.add(tiny.request((*tokens, *first, *tiny.prompt(5, seed=2)), "second", "s"))
    assert made.queued_prefill_tokens <= 7


def test_a_queue_that_empties_takes_more() -> None:
    made = busy()
    made.abort("waiting")
    assert made.queued_prefill_tokens == 0
    made.add(tiny.request(tiny.prompt(90, seed=3), "next"))
    tiny.finish(made)
    made.check()
    assert made.queued_prefill_tokens == 0


def test_without_a_bound_all_may_wait() -> None:
    made = busy(limit=None)
    for n in range(10):
        made.add(tiny.request(tiny.prompt(300, seed=n), f"r{n}"))
    assert made.num_waiting == 11


def test_a_bound_in_seconds_follows_the_measured_pace() -> None:
    backlog = Backlog(seconds=30.0, least=1000)
    assert backlog.bound == 1000
    backlog.pace.note(500, 1.0)
    assert backlog.bound == 15_000
    backlog.pace.note(1, 1000.0)
    assert backlog.bound == 1000


def test_who_is_refused_is_told_when_enough_will_have_been_computed() -> None:
    backlog = Backlog(limit=100)
    backlog.pace.note(10, 1.0)
    backlog.add(1, 90)
    with pytest.raises(Overloaded) as refused:
        backlog.check_room(60, ahead=20)
    assert refused.value.retry_after == pytest.approx((90 + 60 - 100 + 20) / 10)


def test_an_account_that_does_not_close_is_found() -> None:
    backlog = Backlog()
    backlog.add(1, 10)
    with pytest.raises(EngineError):
        backlog.check([1, 2])


@given(
    st.lists(
        st.tuples(st.sampled_from(("add", "remove")), st.integers(0, 5), st.integers(0, 100)),
        max_size=60,
    )
)
def test_the_sum_is_that_of_those_who_wait(events: list[tuple[str, int, int]]) -> None:
    backlog, waiting = Backlog(), dict[int, int]()
    for what, name, tokens in events:
        if what == "add":
            backlog.add(name, tokens)
            waiting[name] = tokens
        else:
            backlog.remove(name)
            waiting.pop(name, None)
        backlog.check(waiting)
        assert backlog.tokens == sum(waiting.values())


@given(
    st.lists(st.tuples(st.sampled_from(("add", "abort", "step")), st.integers(1, 80), st.integers(0, 2)), max_size=40)
)
def test_whatever_comes_and_goes_the_bound_holds_and_the_account_closes(events: list[tuple[str, int, int]]) -> None:
    made, names = engine(100), list[str]()
    for number, (what, length, pick) in enumerate(events):
        if what == "add":
            alone = made.num_waiting == 0
            try:
                made.add(tiny.request(tiny.prompt(length, seed=length), f"r{number}", max_tokens=3))
                names.append(f"r{number}")
            except Overloaded:
                assert not alone
            assert alone or made.queued_prefill_tokens <= 100
        elif what == "abort" and names:
            made.abort(names[pick % len(names)])
        elif made.has_work:
            made.step()
        made.check()
    tiny.finish(made)
    made.check()
    assert made.queued_prefill_tokens == 0
