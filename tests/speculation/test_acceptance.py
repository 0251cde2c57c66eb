"""Estimates of acceptance: from a prior, over all sequences, to each sequence's own."""

from __future__ import annotations

import pytest

from paceline.speculation.acceptance import DRAFT_PRIOR, LOOKUP_PRIOR, Acceptance, Kind, agreeing


def first(found: Acceptance, sequence: int, kind: Kind = Kind.DRAFT, matched: int = 0) -> float:
    return found.run(sequence, kind, matched, 1)[0]


def test_agreeing_tells_refuted_from_unknown() -> None:
    assert agreeing([1, 2, 3], [1, 2]) == (2, False)
    assert agreeing([1, 2, 3], [1, 5, 3]) == (1, True)
    assert agreeing([1], [1, 5]) == (1, False)


def test_what_was_never_seen_is_the_prior() -> None:
    assert first(Acceptance(), 1) == DRAFT_PRIOR
    assert first(Acceptance(), 1, Kind.LOOKUP, 2) == LOOKUP_PRIOR[1]


def test_a_run_is_the_product_of_its_candidates() -> None:
    run = Acceptance().run(1, Kind.DRAFT, 0, 3)
    assert run == [pytest.approx(DRAFT_PRIOR**n) for n in (1, 2, 3)]


def test_a_run_ends_where_it_is_worth_too_little() -> None:
    assert len(Acceptance().run(1, Kind.LOOKUP, 1, 16, least=0.1)) == 1


def test_estimates_approach_what_happens() -> None:
    found = Acceptance()
    for n in range(400):
        found.note(1, Kind.DRAFT, 0, int(n % 4 > 0), n % 4 == 0)
    assert first(found, 1) == pytest.approx(0.75, abs=0.05)


def test_a_new_sequence_begins_at_what_others_had() -> None:
    found = Acceptance()
    for _ in range(200):
        found.note(1, Kind.DRAFT, 0, 0, True)
    assert first(found, 2) < 0.1


def test_a_sequence_departs_from_the_others() -> None:
    found = Acceptance()
    for _ in range(200):
        for sequence in range(1, 10):
            found.note(sequence, Kind.DRAFT, 0, 0, True)
        found.note(10, Kind.DRAFT, 0, 1, False)
    assert first(found, 10) > 0.8


def test_a_deeper_position_that_is_not_reached_follows_the_first() -> None:
    found = Acceptance()
    for _ in range(50):
        found.note(1, Kind.DRAFT, 0, 1, True)
    for _ in range(2000):
        found.note(1, Kind.DRAFT, 0, 1, False)
    one, two = found.run(1, Kind.DRAFT, 0, 2)
    assert two / one > 0.8


def test_each_accepted_candidate_of_a_lookup_makes_the_match_longer() -> None:
    found = Acceptance()
    for _ in range(100):
        found.note(1, Kind.LOOKUP, 2, 1, True)
    assert first(found, 1, Kind.LOOKUP, 2) > 0.9
    assert first(found, 1, Kind.LOOKUP, 3) < 0.1


def test_a_closed_sequence_leaves_nothing_of_its_own() -> None:
    found = Acceptance()
    for _ in range(50):
        found.note(1, Kind.DRAFT, 0, 1, False)
    found.close(1)
    assert found._one == {}
