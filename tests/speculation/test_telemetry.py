from __future__ import annotations

from paceline.speculation.telemetry import SpeculationTally, merged
from paceline.types import SourceMetrics


def tallied(*runs: tuple[str, int, int]) -> SpeculationTally:
    tally = SpeculationTally()
    for run in runs:
        tally.note(*run)
    return tally


def test_candidates_are_counted_by_their_place() -> None:
    assert tallied(("remote", 3, 2), ("remote", 2, 0)).sources() == (SourceMetrics("remote", (2, 2, 1), (1, 1, 0)),)


def test_sources_are_counted_apart() -> None:
    found = tallied(("remote", 1, 1), ("prompt_lookup", 2, 1)).sources()
    assert found == (SourceMetrics("remote", (1,), (1,)), SourceMetrics("prompt_lookup", (1, 1), (1, 0)))


def test_what_did_not_become_output_was_rolled_back() -> None:
    assert tallied(("remote", 4, 1)).sources()[0].rolled_back == 3


def test_totals_are_sums_over_sources_and_places() -> None:
    tally = tallied(("remote", 3, 2), ("prompt_lookup", 2, 1))
    assert (tally.drafted, tally.accepted) == (5, 3)


def test_no_candidates_make_no_source() -> None:
    assert SpeculationTally().sources() == ()


def test_merging_adds_place_by_place() -> None:
    short, long = tallied(("remote", 1, 1)).sources(), tallied(("remote", 3, 1), ("local", 1, 0)).sources()
    assert merged([short, long]) == (
        SourceMetrics("remote", (2, 1, 1), (2, 0, 0)),
        SourceMetrics("local", (1,), (0,)),
    )


def test_merging_nothing_is_nothing() -> None:
    assert merged([]) == ()
