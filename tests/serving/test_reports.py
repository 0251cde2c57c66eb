"""What a replica tells the policy and its status."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.engine.drafter import Drafter
from paceline.engine.meters import DrafterMeter
from paceline.serving.reports import LONGEST_IMPORT_S, DraftReport, Starting, TargetReport, own_age_s
from paceline.speculation.local import LocalProposer
from tests import tiny

MODEL = tiny.tiny_llama()
RUNNER = tiny.ours(MODEL)


def drafter() -> Drafter:
    return Drafter(RUNNER, tiny.kv_for(RUNNER), max_batched_tokens=64, max_model_len=512)


def report(itl_s: float = 1.0) -> TargetReport:
    engine = tiny.engine_for(MODEL, runner=RUNNER, proposer=LocalProposer(drafter()), depth="auto", max_num_seqs=48)
    return TargetReport("t", engine, itl_s, 12.5)


def test_the_start_counts_from_the_process() -> None:
    times = iter([100.0, 107.0])
    assert Starting(lambda: next(times), lambda: 4.0).done() == 11.0


@pytest.mark.parametrize("age", [LONGEST_IMPORT_S + 1, -5.0])
def test_a_process_that_waited_for_work_does_not_count(age: float) -> None:
    times = iter([100.0, 107.0])
    assert Starting(lambda: next(times), lambda: age).done() == 7.0


def test_this_process_has_an_age() -> None:
    assert own_age_s() > 0


def test_a_target_tells_its_sessions_and_its_start() -> None:
    told = report()
    requests = [tiny.request(tiny.prompt(20, seed=n), str(n), max_tokens=2) for n in range(3)]
    tiny.run(told.engine, *(replace(request, session_id=request.request_id) for request in requests[:2]), requests[2])
    seen = told.load()
    assert (seen.sessions, seen.start_s) == (2, 12.5)


def test_its_seats_are_those_within_the_objective() -> None:
    cost = tiny.flat_cost()
    assert report((cost.seconds(7, 7) + cost.seconds(8, 8)) / 2).load().seats == 7


def test_a_targets_status_has_its_load_and_its_counters() -> None:
    status = report().status()
    assert status["load"]["seats"] == 48
    assert (status["draft_saved_s"], status["draft_tokens_wanted"]) == (0.0, 0)


def test_without_speculation_nothing_is_said_of_what_drafts_save() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER)
    status = TargetReport("t", engine, 1.0, 2.0).status()
    assert (status["draft_saved_s"], status["draft_tokens_wanted"]) == (None, 0)


def test_a_drafter_tells_its_load_and_how_long_it_was_busy() -> None:
    status = DraftReport("d", DrafterMeter(drafter()), 3.0).status()
    assert status["busy_s"] == 0.0
    assert status["load"]["start_s"] == 3.0
