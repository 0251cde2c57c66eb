"""Who takes which session."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from paceline.sessions.handoff import Outcome, Room, by_holder, plan, wanted_first

SESSIONS = {f"s{n}": 10 for n in range(9)}


def test_sessions_spread_evenly_over_equal_peers() -> None:
    holders = plan(SESSIONS, [Room(name, 1000) for name in "abc"])
    assert Counter(holders.values()) == {"a": 3, "b": 3, "c": 3}


def test_a_busy_peer_gets_fewer() -> None:
    holders = plan(SESSIONS, [Room("busy", 1000, load=5), Room("idle", 1000)])
    assert Counter(holders.values()) == {"busy": 2, "idle": 7}


def test_among_equally_busy_peers_the_one_with_more_room_is_first() -> None:
    assert plan({"s": 10}, [Room("small", 50), Room("large", 60)]) == {"s": "large"}


def test_what_fits_nowhere_stays_and_smaller_ones_after_it_go() -> None:
    assert plan({"large": 60, "small": 40}, [Room("a", 50)]) == {"small": "a"}


def test_those_first_in_the_order_get_the_room() -> None:
    assert list(plan(SESSIONS, [Room("a", 30)])) == ["s0", "s1", "s2"]


def test_where_all_caches_are_full_all_sessions_lose_the_same_share() -> None:
    held = {f"s{n}": 10 for n in range(30)}
    holders = plan(held, [Room("a", 0, idle=300), Room("b", 0, idle=300)])
    assert Counter(holders.values()) == {"a": 10, "b": 10}


def test_without_peers_all_stay() -> None:
    assert plan(SESSIONS, []) == {}


@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 100), max_size=12),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 9)), max_size=4),
)
def test_no_peer_gets_more_than_it_has_room_for(held: dict[str, int], sizes: list[tuple[int, int, int]]) -> None:
    rooms = [Room(str(n), *size) for n, size in enumerate(sizes)]
    shares = by_holder(plan(held, rooms))
    for room in rooms:
        assert sum(held[name] for name in shares.get(room.replica, ())) <= room.free + room.idle
    assert sum(map(len, shares.values())) <= len(held)


def test_sessions_somebody_waits_for_come_first_in_their_order() -> None:
    assert wanted_first(["a", "b", "c", "d"], {"d", "b", "x"}) == ["b", "d", "a", "c"]


def test_the_reasons_of_those_left_behind_are_counted() -> None:
    assert Outcome(left={"a": "refused", "b": "out of time", "c": "refused"}).why() == "2 refused, 1 out of time"
