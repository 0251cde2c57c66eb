"""Which target replica is tried first, as pure functions of what is known."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.serving.routing import Holders, rank

names = st.text(st.sampled_from("abcd"), min_size=1, max_size=2)
loads = st.dictionaries(names, st.integers(0, 5), max_size=6)


def flat(ranked: list[list[str]]) -> list[str]:
    return [name for (name,) in ranked]


def test_the_holder_comes_first_however_loaded() -> None:
    assert rank("b", {"a": 0, "b": 9, "c": 1}) == [["b"], ["a"], ["c"]]


def test_without_a_holder_the_least_loaded_comes_first() -> None:
    assert rank(None, {"a": 3, "b": 1, "c": 2}) == [["b"], ["c"], ["a"]]


def test_a_holder_that_is_gone_is_no_candidate() -> None:
    assert rank("gone", {"a": 1, "b": 0}) == [["b"], ["a"]]


def test_no_replicas_are_no_candidates() -> None:
    assert rank("a", {}) == []


def test_one_replica_is_the_candidate() -> None:
    assert rank(None, {"a": 7}, turn=5) == [["a"]]


def test_a_burst_among_equals_spreads_evenly() -> None:
    first = Counter(flat(rank(None, {"a": 0, "b": 0, "c": 0}, turn))[0] for turn in range(9))
    assert first == {"a": 3, "b": 3, "c": 3}


def test_load_counts_more_than_the_turn() -> None:
    assert {flat(rank(None, {"a": 1, "b": 0, "c": 1}, turn))[0] for turn in range(9)} == {"b"}


@given(st.none() | names, loads, st.integers(0, 1000))
def test_every_replica_is_tried_once(holder: str | None, load: dict[str, int], turn: int) -> None:
    assert sorted(flat(rank(holder, load, turn))) == sorted(load)


@given(st.none() | names, loads, st.integers(0, 1000))
def test_after_the_holder_load_never_falls(holder: str | None, load: dict[str, int], turn: int) -> None:
    rest = [load[name] for name in flat(rank(holder, load, turn)) if name != holder]
    assert rest == sorted(rest)


@given(loads, st.integers(0, 1000), st.randoms())
def test_the_order_in_which_replicas_are_listed_is_nothing(load: dict[str, int], turn: int, random: object) -> None:
    listed = list(load.items())
    random.shuffle(listed)  # type: ignore[attr-defined]
    assert rank(None, dict(listed), turn) == rank(None, load, turn)


def test_a_session_is_where_it_was_put() -> None:
    holders = Holders()
    holders.put("s", "a")
    assert holders.get("s") == "a"


def test_an_unknown_session_is_nowhere() -> None:
    assert Holders().get("s") is None


def test_a_session_that_moved_is_where_it_is_now() -> None:
    holders = Holders()
    holders.put("s", "a")
    holders.put("s", "b")
    assert holders.get("s") == "b"


def test_the_session_routed_longest_ago_is_forgotten_first() -> None:
    holders = Holders(limit=2)
    for session, replica in (("s", "a"), ("t", "b"), ("s", "a"), ("u", "c")):
        holders.put(session, replica)
    assert [holders.get(session) for session in "stu"] == ["a", None, "c"]


@pytest.mark.parametrize("alive", [["a"], ["a", "x"]])
def test_sessions_of_replicas_that_are_gone_are_forgotten(alive: list[str]) -> None:
    holders = Holders()
    holders.put("s", "a")
    holders.put("t", "b")
    holders.forget_all_but(alive)
    assert [holders.get(session) for session in "st"] == ["a", None]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc"))), st.integers(1, 5))
def test_no_more_is_remembered_than_the_limit(puts: list[tuple[int, str]], limit: int) -> None:
    holders = Holders(limit)
    for session, replica in puts:
        holders.put(str(session), replica)
    assert sum(holders.get(str(session)) is not None for session in range(10)) <= limit
