from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from paceline.speculation.idle import ENOUGH_STEPS, GRACE_S, REPEAT_S, Facts, IdleWatch
from paceline.speculation.telemetry import SpeculationTally


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class World:
    """A target with a drafter and prompt lookup; `run` lets it decode."""

    def __init__(self, **facts: object) -> None:
        self.clock, self.tally = Clock(), SpeculationTally()
        self.facts = replace(Facts(self.tally, lookup=True, drafts_wanted=True, drafters_connected=1), **facts)  # type: ignore[arg-type]
        self.watch = IdleWatch(self.clock)

    def run(self, steps: int = ENOUGH_STEPS, drafted: int = 0, requests: int = 0, declined: int = 0) -> World:
        self.tally.steps += steps
        self.tally.requests += requests
        self.tally.declined += declined
        if drafted:
            self.tally.note("remote", drafted, 0)
        return self

    def look(self, **facts: object) -> str:
        return "; ".join(self.watch.look(replace(self.facts, **facts)))  # type: ignore[arg-type]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_speculation_at_work_is_no_warning() -> None:
    assert World().run(drafted=3).look() == ""


def test_no_traffic_is_no_warning() -> None:
    assert World().look() == ""


def test_a_few_steps_without_candidates_are_no_warning() -> None:
    assert World().run(steps=ENOUGH_STEPS - 1).look() == ""


def test_switched_off_is_no_warning() -> None:
    assert World(enabled=False, drafters_connected=0).run().look() == ""


def test_without_a_connected_drafter_the_reason_is_passed_on() -> None:
    found = World(drafters_connected=0, problems="d: another tokenizer").look()
    assert found == (
        "speculation is on, but no drafter is connected (d: another tokenizer): prompt lookup alone has candidates"
    )


def test_without_a_drafter_and_lookup_answers_are_slower() -> None:
    assert World(drafters_connected=0, lookup=False).look().endswith("answers are right, and slower")


@pytest.mark.parametrize(
    ("facts", "ran", "why"),
    [
        ({"lookup": False, "drafts_wanted": False}, {}, "there is neither a drafter nor prompt lookup"),
        ({}, {"requests": 3, "declined": 3}, "every request asks for none"),
        ({"rests": True}, {"requests": 3, "declined": 2}, "drafting does not pay at this load, so the depth is 0"),
        ({}, {"requests": 3}, "no source has any"),
    ],
)
def test_idle_speculation_says_why(facts: dict[str, object], ran: dict[str, int], why: str) -> None:
    found = World(**facts).run(**ran).look()
    assert found == f"speculation is on, but {ENOUGH_STEPS} decode steps had no candidate: {why}"


def test_late_drafters_are_a_reason() -> None:
    world = World().run()
    world.tally.late += 7
    assert world.look().endswith("drafters are too late (7 times)")


def test_one_candidate_ends_it() -> None:
    world = World().run()
    world.look()
    assert world.run(steps=1, drafted=1).look() == ""


def test_it_may_begin_again() -> None:
    world = World().run(drafted=1)
    world.look()
    assert "no candidate" in world.run().look()


def test_synthetic_acceptance_is_a_warning() -> None:
    assert "accepted with probability 0.7, whatever they are" in World(synthetic_acceptance=0.7).look()


def test_a_state_is_logged_when_it_begins_and_not_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World().run()
    for _ in range(3):
        world.run().look()
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(("later", "logged"), [(REPEAT_S / 2, 1), (REPEAT_S, 2)])
def test_a_state_that_comes_and_goes_is_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, later: float, logged: int
) -> None:
    world = World().run()
    world.look()
    world.run(drafted=1).look()
    world.clock.now += later
    world.run().look()
    assert len(warnings(caplog)) == logged


def test_lookup_alone_without_repetition_is_a_reason() -> None:
    assert World(drafts_wanted=False).run().look().endswith("prompt lookup is the only source, and nothing repeats")


def test_drafters_that_still_load_are_shown_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert World(drafters_connected=0).look() != ""
    assert warnings(caplog) == []


def test_drafters_that_stay_away_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    world = World(drafters_connected=0)
    world.look()
    world.clock.now += GRACE_S
    world.look()
    assert len(warnings(caplog)) == 1
