"""Which target replica serves a request, as pure functions of what is known."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.sessions.placement import (
    ALWAYS_FREE,
    HOLDER_FREE,
    Holders,
    Mode,
    Ongoing,
    Placement,
    Reason,
    Route,
    Wish,
    load_bound,
    place,
)

names = st.sampled_from("abcdef")
loads = st.dictionaries(names, st.integers(0, 30), min_size=1, max_size=6)
wishes = st.builds(
    Wish,
    holder=st.none() | names | st.just("gone"),
    prefixes=st.dictionaries(names, st.integers(0, 10).map(lambda n: 64 * n)),
    prompt_tokens=st.integers(1, 800),
    avoid=st.sets(names, max_size=3),
)
modes = st.sampled_from(["soft", "hard"])
turns = st.integers(0, 1000)


def test_the_holder_comes_first() -> None:
    assert place(Wish("b"), {"a": 0, "b": 3, "c": 1}) == Placement(("b", "a", "c"), Reason.HOLDER)


def test_a_new_session_goes_to_the_least_loaded() -> None:
    assert place(Wish(), {"a": 3, "b": 1, "c": 2}) == Placement(("b", "c", "a"), Reason.LEAST_LOADED)


def test_a_prefix_counts_more_than_load() -> None:
    wish = Wish(prefixes={"a": 640, "b": 64}, prompt_tokens=700)
    assert place(wish, {"a": 3, "b": 0, "c": 0}) == Placement(("a", "b", "c"), Reason.PREFIX)


def test_the_longest_prefix_comes_first() -> None:
    wish = Wish(prefixes={"a": 512, "b": 640, "c": 448}, prompt_tokens=700)
    assert place(wish, {"a": 0, "b": 1, "c": 0}).order == ("b", "a", "c")


def test_a_prefix_that_is_little_of_the_prompt_decides_nothing() -> None:
    wish = Wish(prefixes={"a": 128}, prompt_tokens=700)
    assert place(wish, {"a": 1, "b": 0}) == Placement(("b", "a"), Reason.LEAST_LOADED)


def test_an_overloaded_holder_is_passed_over() -> None:
    assert place(Wish("a"), {"a": 12, "b": 2, "c": 1}) == Placement(("c", "b", "a"), Reason.HOLDER_OVERLOADED)


def test_an_overloaded_prefix_is_passed_over() -> None:
    wish = Wish(prefixes={"a": 640}, prompt_tokens=640)
    assert place(wish, {"a": 12, "b": 2}) == Placement(("b", "a"), Reason.LEAST_LOADED)


def test_an_overloaded_holder_gives_way_to_the_longest_prefix() -> None:
    wish = Wish("a", prefixes={"a": 640, "b": 640}, prompt_tokens=640)
    assert place(wish, {"a": 12, "b": 2, "c": 1}) == Placement(("b", "c", "a"), Reason.HOLDER_OVERLOADED)


def test_a_few_requests_overload_no_holder_however_idle_the_others_are() -> None:
    assert place(Wish("a"), {"a": HOLDER_FREE - 1, "b": 0, "c": 0}).order[0] == "a"
    assert place(Wish("a"), {"a": HOLDER_FREE, "b": 0, "c": 0}).order[0] != "a"


def test_a_replica_that_only_shares_a_prefix_is_overloaded_sooner() -> None:
    wish = Wish(prefixes={"a": 640}, prompt_tokens=640)
    assert place(wish, {"a": ALWAYS_FREE - 1, "b": 0, "c": 0}).order[0] == "a"
    assert place(wish, {"a": ALWAYS_FREE, "b": 0, "c": 0}).order[0] != "a"


def test_where_all_are_busy_alike_a_holder_keeps_its_session() -> None:
    assert place(Wish("b"), {"a": 50, "b": 52, "c": 48}).reason is Reason.HOLDER


def test_a_holder_that_is_gone_keeps_nobody_waiting() -> None:
    for mode in ("soft", "hard"):
        assert place(Wish("gone"), {"a": 1, "b": 0}, mode=mode) == Placement(("b", "a"), Reason.HOLDER_GONE)  # type: ignore[arg-type]


def test_a_replica_that_failed_the_request_is_not_asked_again() -> None:
    assert place(Wish("a", avoid=("a",)), {"a": 0, "b": 3}) == Placement(("b",), Reason.RESUMED)
    assert place(Wish("a", avoid=("a",)), {"a": 0, "b": 3}, mode="hard") == Placement(("b",), Reason.RESUMED)


def test_if_every_replica_failed_it_all_are_asked_again() -> None:
    assert place(Wish(avoid=("a", "b")), {"a": 1, "b": 0}) == Placement(("b", "a"), Reason.RESUMED)


def test_under_hard_routing_the_holder_is_waited_for() -> None:
    assert place(Wish("a"), {"a": 99, "b": 0}, mode="hard") == Placement(("a",), Reason.HOLDER)


def test_no_replicas_are_no_candidates() -> None:
    assert place(Wish("a"), {}).order == ()


def test_a_burst_among_equals_spreads_evenly() -> None:
    first = Counter(place(Wish(), {"a": 0, "b": 0, "c": 0}, turn=turn).order[0] for turn in range(9))
    assert first == {"a": 3, "b": 3, "c": 3}


def test_load_counts_more_than_the_turn() -> None:
    assert {place(Wish(), {"a": 1, "b": 0, "c": 1}, turn=turn).order[0] for turn in range(9)} == {"b"}


@given(wishes, loads, turns)
def test_every_replica_that_did_not_fail_is_tried_once(wish: Wish, load: dict[str, int], turn: int) -> None:
    order = place(wish, load, turn=turn).order
    assert sorted(order) == sorted(set(load) - set(wish.avoid) or load)


@given(wishes, loads, modes, turns, st.randoms())
def test_the_order_in_which_replicas_are_listed_is_nothing(
    wish: Wish, load: dict[str, int], mode: Mode, turn: int, random: object
) -> None:
    listed = list(load.items())
    random.shuffle(listed)  # type: ignore[attr-defined]
    assert place(wish, dict(listed), mode=mode, turn=turn) == place(wish, load, mode=mode, turn=turn)


@given(wishes, loads, st.floats(1, 4), turns)
def test_softly_nothing_goes_to_an_overloaded_replica_while_another_is_free(
    wish: Wish, load: dict[str, int], factor: float, turn: int
) -> None:
    bound = load_bound(load, factor)
    order = place(wish, load, factor=factor, turn=turn).order
    overloaded = [load[name] >= (max(bound, HOLDER_FREE) if name == wish.holder else bound) for name in order]
    if order[0] != wish.holder:
        overloaded = [load[name] >= bound for name in order]
    assert overloaded == sorted(overloaded)


@given(loads, st.floats(1, 4))
def test_some_replica_is_always_free(load: dict[str, int], factor: float) -> None:
    assert min(load.values()) < load_bound(load, factor)


@given(wishes, loads, turns)
def test_a_living_holder_is_never_left_under_hard_routing(wish: Wish, load: dict[str, int], turn: int) -> None:
    placement = place(wish, load, mode="hard", turn=turn)
    if wish.holder in set(load) - set(wish.avoid):
        assert placement == Placement((wish.holder,), Reason.HOLDER)
    else:
        assert len(placement.order) == len(set(load) - set(wish.avoid) or load)


@given(st.integers(2, 6), st.integers(1, 200), st.floats(1, 3), turns)
def test_a_burst_of_new_sessions_loads_all_alike(replicas: int, burst: int, factor: float, turn: int) -> None:
    load = dict.fromkeys("abcdef"[:replicas], 0)
    for n in range(burst):
        load[place(Wish(), load, factor=factor, turn=turn + n).order[0]] += 1
    assert max(load.values()) - min(load.values()) <= 1


@given(st.integers(2, 6), st.integers(1, 200), turns)
def test_a_burst_that_shares_a_prompt_stays_within_the_bound(replicas: int, burst: int, turn: int) -> None:
    load = dict.fromkeys("abcdef"[:replicas], 0)
    wish = Wish(prefixes={"a": 640}, prompt_tokens=700)
    for n in range(burst):
        load[place(wish, load, turn=turn + n).order[0]] += 1
    assert max(load.values()) <= load_bound(load, 1.5)


def test_the_first_choice_is_told_its_reason_and_any_other_that_it_was_full() -> None:
    route = Route("a", "holder")
    assert (route.told_by("a"), route.told_by("b")) == ("holder", "full")
    assert Route().told_by("a") == ""


def test_a_session_is_where_it_was_put() -> None:
    holders: Holders[str] = Holders(9)
    holders.put("s", "a")
    holders.put("s", "b")
    assert (holders.get("s"), holders.get("t")) == ("b", None)


def test_the_session_routed_longest_ago_is_forgotten_first() -> None:
    holders: Holders[str] = Holders(2)
    for session, replica in (("s", "a"), ("t", "b"), ("s", "a"), ("u", "c")):
        holders.put(session, replica)
    assert [holders.get(session) for session in "stu"] == ["a", None, "c"]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"))), st.integers(1, 5))
def test_no_more_is_remembered_than_the_limit(puts: list[tuple[int, str]], limit: int) -> None:
    holders: Holders[int] = Holders(limit)
    for session, replica in puts:
        holders.put(session, replica)
    assert sum(holders.get(session) is not None for session in range(10)) <= limit


def test_a_choice_counts_before_the_replica_accepts() -> None:
    ongoing = Ongoing()
    ongoing.choose("r", "a")
    assert ongoing.count("a") == 1
    ongoing.begin("r", "a")
    assert ongoing.count("a") == 1
    ongoing.end("r", "a")
    assert ongoing.count("a") == 0


def test_a_request_counts_where_it_was_accepted() -> None:
    ongoing = Ongoing()
    ongoing.choose("r", "a")
    ongoing.choose("r", "b")
    ongoing.begin("r", "c")
    assert [ongoing.count(name) for name in "abc"] == [0, 0, 1]


@pytest.mark.parametrize("how", ["refused", "cancelled"])
def test_a_choice_that_came_to_nothing_does_not_count(how: str) -> None:
    ongoing = Ongoing()
    ongoing.choose("r", "a")
    if how == "refused":
        ongoing.end("r", "a")
    else:
        ongoing.forget("r")
    assert ongoing.count("a") == 0


def test_an_end_heard_before_the_acceptance_is_the_end() -> None:
    ongoing = Ongoing()
    ongoing.end("r", "a")
    ongoing.begin("r", "a")
    assert ongoing.count("a") == 0


@given(st.lists(st.tuples(st.sampled_from(["choose", "begin", "end", "forget"]), st.integers(0, 3), names)))
def test_no_count_is_ever_negative(events: list[tuple[str, int, str]]) -> None:
    ongoing = Ongoing()
    for what, request, replica in events:
        if what == "forget":
            ongoing.forget(str(request))
        else:
            getattr(ongoing, what)(str(request), replica)
        assert all(ongoing.count(name) >= 0 for name in "abcdef")
