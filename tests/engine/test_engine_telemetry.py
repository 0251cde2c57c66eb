"""What an engine counts and times adds up to what its requests were given."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from paceline.engine.engine import Engine
from paceline.engine.kv_files import KVFiles
from paceline.engine.kv_memory import Slabs
from paceline.engine.kv_tiers import KVTiers
from paceline.engine.status import session_states, status_of
from paceline.engine.telemetry import EngineTelemetry, Phase
from paceline.types import Request
from tests import tiny
from tests.engine.by_hand import PLENTY

MODEL = tiny.tiny_llama()
RUNNER = tiny.ours(MODEL)
SLABS = Slabs(tiny.geometry_of(RUNNER), 512)
LONG = tiny.prompt(100)
LENGTHS = {"a": 12, "b": 1, "c": 7}
"""Tokens each request asks for."""
PROMPTS = {name: tiny.prompt(20 + 5 * n, seed=n) for n, name in enumerate(LENGTHS)}


class Ticking:
    """A clock that goes on a second whenever it is looked at."""

    def __init__(self) -> None:
        self._seconds = itertools.count(1)

    def __call__(self) -> float:
        return float(next(self._seconds))


def requests() -> list[Request]:
    return [tiny.request(PROMPTS[name], name, max_tokens=length) for name, length in LENGTHS.items()]


@pytest.fixture
def engine() -> Engine:
    return tiny.engine_for(MODEL, runner=RUNNER)


@pytest.fixture
def done(engine: Engine) -> EngineTelemetry:
    """Of an engine that answered all requests."""
    tiny.run(engine, *requests())
    return engine.telemetry


def test_generation_tokens_are_those_of_all_deltas(engine: Engine) -> None:
    tokens = tiny.run(engine, *requests())
    assert engine.telemetry.generation_tokens == sum(map(len, tokens.values()))


def test_prompt_tokens_are_those_of_all_prompts(done: EngineTelemetry) -> None:
    assert done.prompt_tokens == sum(map(len, PROMPTS.values()))


def test_every_request_has_a_time_to_first_token(done: EngineTelemetry) -> None:
    assert done.ttft.count == len(LENGTHS)


@pytest.mark.parametrize("name", ["total", "queue", "prefill", "decode", "request_prompt", "request_generation"])
def test_every_request_that_ended_is_in_the_histograms_of_requests(done: EngineTelemetry, name: str) -> None:
    assert getattr(done, name).count == len(LENGTHS)


def test_the_sums_of_tokens_are_those_asked_for_and_given(done: EngineTelemetry) -> None:
    assert (done.request_prompt.total, done.request_generation.total) == (
        sum(map(len, PROMPTS.values())),
        sum(LENGTHS.values()),
    )


def test_a_delta_after_the_first_is_a_gap(done: EngineTelemetry) -> None:
    assert done.gap.count == sum(LENGTHS.values()) - len(LENGTHS)


def test_one_token_has_no_time_per_output_token(done: EngineTelemetry) -> None:
    assert done.per_token.count == sum(length > 1 for length in LENGTHS.values())


def test_requests_are_counted_by_why_they_ended(done: EngineTelemetry) -> None:
    assert done.finished == {"stop": 0, "length": len(LENGTHS), "abort": 0}


def test_queue_prefill_and_decode_make_up_the_whole_of_a_request() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER, engine_clock=Ticking())
    tiny.run(engine, *requests())
    done = engine.telemetry
    assert done.queue.total + done.prefill.total + done.decode.total == done.total.total > 0


def test_an_aborted_request_is_counted_and_in_no_histogram_of_requests(engine: Engine) -> None:
    engine.add(tiny.request(PROMPTS["a"], "a", max_tokens=12))
    first = engine.step()["a"]
    engine.abort("a")
    done = engine.telemetry
    assert (done.finished["abort"], done.total.count, done.generation_tokens) == (1, 0, len(first.token_ids))


def test_an_abort_of_nobody_is_not_counted(done: EngineTelemetry, engine: Engine) -> None:
    engine.abort("a")
    assert done.finished["abort"] == 0


def test_step_tokens_are_the_rows_of_every_step(engine: Engine) -> None:
    rows, steps = 0, 0
    run = engine._runner.run

    def counted(windows):  # type: ignore[no-untyped-def]
        nonlocal rows, steps
        rows, steps = rows + sum(len(window.token_ids) for window in windows), steps + 1
        return run(windows)

    engine._runner.run = counted  # type: ignore[method-assign]
    try:
        tiny.run(engine, *requests())
    finally:
        del engine._runner.run  # type: ignore[attr-defined]
    assert (engine.telemetry.step_tokens.total, engine.telemetry.step_tokens.count) == (rows, steps)


def test_every_step_has_a_time_for_each_phase(done: EngineTelemetry) -> None:
    counts = {phase: times.count for phase, times in done.step.histograms.items()}
    assert counts == dict.fromkeys(Phase, done.step_tokens.count)


def test_the_phases_of_a_step_make_up_its_time() -> None:
    clock = Ticking()
    engine = tiny.engine_for(MODEL, runner=RUNNER, engine_clock=clock)
    engine.add(tiny.request(PROMPTS["a"], "a", max_tokens=1))
    before = clock()
    engine.step()
    inside = clock() - before - 2  # the look that begins the step, and this one
    assert sum(times.total for times in engine.telemetry.step.histograms.values()) == inside


def test_prefix_hits_are_the_tokens_found() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER)
    prompt = tiny.prompt(40)
    metrics = []
    for name in ("first", "second"):
        engine.add(tiny.request(prompt, name, "s", max_tokens=2))
        metrics += [delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics is not None]
    found = sum(each.cached_tokens for each in metrics)
    told = engine.telemetry
    assert (told.prefix_queries, told.prefix_hits, told.kv_hits["device"]) == (2 * len(prompt), found, found)
    assert found == len(prompt) - 1


def test_hits_in_host_memory_are_told_apart() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER, tiers=KVTiers(SLABS, PLENTY))
    tiny.run(engine, tiny.request(LONG, "before", "s", max_tokens=2))
    engine.kv.evict(engine.kv.usage().total)
    tiny.run(engine, tiny.request(LONG, "after", "s", max_tokens=2))
    assert engine.telemetry.kv_hits == {"device": 0, "host": len(LONG) - 1, "disk": 0}


def test_hits_on_disk_are_told_apart(tmp_path: Path) -> None:
    def engine() -> Engine:
        files = KVFiles(tmp_path, "a model", PLENTY, 3600.0)
        return tiny.engine_for(MODEL, runner=RUNNER, tiers=KVTiers(SLABS, 0, files))

    before, after = engine(), engine()
    tiny.run(before, tiny.request(LONG, session="s", max_tokens=2))
    before.close(60.0)
    tiny.run(after, tiny.request(LONG, session="s", max_tokens=2))
    assert after.telemetry.kv_hits == {"device": 0, "host": 0, "disk": len(LONG) - 1}


def test_a_sequence_that_yields_is_a_preemption() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER, max_num_seqs=1)
    engine.add(tiny.request(PROMPTS["a"], "late", max_tokens=8))
    engine.step()
    engine.add(Request("urgent", PROMPTS["b"], tiny.request((3,), max_tokens=2).params, priority=-1))
    tiny.finish(engine)
    assert engine.preemptions == 1


def test_windows_are_counted_by_source_and_depth() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER, lookup=4)
    tiny.run(engine, tiny.request((5, 6, 7, 8) * 8, max_tokens=24))
    (source,) = engine.tally.sources()
    depth = engine.telemetry.depth[source.source]
    assert (depth.count, depth.total) == (source.drafted[0], sum(source.drafted))


def test_a_window_of_several_tokens_is_one_gap() -> None:
    engine = tiny.engine_for(MODEL, runner=RUNNER, lookup=4)
    engine.add(tiny.request((5, 6, 7, 8) * 8, max_tokens=24))
    deltas = tiny.deltas(engine)
    assert engine.telemetry.gap.count == len(deltas) - 1 < 23


def test_the_status_is_plain(engine: Engine) -> None:
    tiny.run(engine, *requests())
    told = status_of(engine)
    assert json.loads(json.dumps(told)) == told


def test_sessions_are_counted_once_where_they_are_soonest_at_hand(tmp_path: Path) -> None:
    files = KVFiles(tmp_path, "a model", PLENTY, 3600.0)
    before = tiny.engine_for(MODEL, runner=RUNNER, tiers=KVTiers(SLABS, 0, files))
    for name in ("on disk", "on both"):
        tiny.run(before, tiny.request(LONG, session=name, max_tokens=2))
    before.close(60.0)
    tiers = KVTiers(SLABS, PLENTY, KVFiles(tmp_path, "a model", PLENTY, 3600.0))
    tiers.sweep()
    engine = tiny.engine_for(MODEL, runner=RUNNER, tiers=tiers)
    tiny.run(engine, tiny.request(tiny.prompt(100, seed=5), session="evicted", max_tokens=2))
    engine.kv.evict(engine.kv.usage().total)
    tiny.run(engine, tiny.request(LONG, session="on both", max_tokens=2))
    engine.add(tiny.request(tiny.prompt(9), "runs", "running", max_tokens=4))
    engine.step()
    assert session_states(engine) == {"running": 1, "idle": 1, "host": 1, "disk": 1}
