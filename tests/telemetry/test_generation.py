"""What a target's part of a request becomes, however it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paceline.errors import Unavailable
from paceline.telemetry.generation import Generation
from paceline.types import Delta, Failure, FinishReason, Metrics, Request, SamplingParams
from tests.telemetry.recorded import CLIENT, CLIENT_SPAN, Recorded, about, parent_of, span_id

NAME = "paceline.generate"
METRICS = Metrics(prompt_tokens=5, cached_tokens=2, completion_tokens=3, queue_s=0.5, ttft_s=2.0, total_s=3.0)
LAST = Delta((1,), "", FinishReason.LENGTH, METRICS)


def request(**options: Any) -> Request:
    return Request("r", (1, 2, 3, 4, 5), SamplingParams(n=options.pop("n", 1), seed=1), trace=CLIENT, **options)


def ended(*frames: Delta | Failure, **options: Any) -> Recorded:
    recorded = Recorded()
    with Generation.begin(recorded.tracer, request(**options), "target-1") as generation:
        hear = generation.hearing(lambda _: None)
        for frame in frames:
            hear(frame)
    return recorded


def test_what_goes_on_to_the_drafters_is_the_generation_s_own_trace() -> None:
    recorded = Recorded()
    with Generation.begin(recorded.tracer, request(), "target-1") as generation:
        pass
    span = recorded.spans[NAME]
    assert parent_of(span) == CLIENT_SPAN
    assert generation.request.trace.split("-")[2] == f"{span_id(span):016x}"


def test_phases_are_as_long_as_the_engine_noted() -> None:
    spans = ended(LAST).spans
    lengths = {name: (spans[name].end_time or 0) - (spans[name].start_time or 0) for name in spans if name != NAME}
    assert lengths == {"paceline.queue": 5 * 10**8, "paceline.prefill": 15 * 10**8, "paceline.decode": 10**9}


def test_a_prefill_tells_what_it_computed() -> None:
    assert about(ended(LAST).spans["paceline.prefill"]) == {"paceline.computed_tokens": 3}


def test_outputs_of_one_prompt_are_one_generation() -> None:
    found = about(ended(LAST, replace(LAST, index=1), n=2).spans[NAME])
    assert (found["gen_ai.usage.output_tokens"], found["gen_ai.response.finish_reasons"]) == (6, ("length", "length"))


def test_a_generation_that_lacks_an_output_was_cancelled() -> None:
    assert about(ended(LAST, n=2).spans[NAME])["error.type"] == "cancelled"


def test_a_failure_is_an_error() -> None:
    span = ended(Failure.of(Unavailable("gone"))).spans[NAME]
    assert (span.status.description, about(span)["error.type"]) == ("service_unavailable", "service_unavailable")


def test_an_error_on_the_way_is_one_too() -> None:
    recorded = Recorded()
    with pytest.raises(RuntimeError), Generation.begin(recorded.tracer, request(), "target-1"):
        raise RuntimeError("private words")
    assert recorded.spans[NAME].status.description == "internal_error"


def test_an_answer_that_goes_on_here_says_what_it_had() -> None:
    assert about(ended(LAST, resumed=((7, 8),)).spans[NAME])["paceline.resumed_tokens"] == 2


def test_a_wait_for_a_session_on_its_way_is_a_part_of_it() -> None:
    recorded = Recorded()
    with Generation.begin(recorded.tracer, request(), "target-1") as generation:
        generation.waited(1)
    assert recorded.spans["paceline.handoff"].start_time == 1


def test_what_is_heard_is_passed_on_as_it_is() -> None:
    heard: list[Delta | Failure] = []
    generation = Generation.begin(Recorded().tracer, request(), "target-1")
    generation.hearing(heard.append)(LAST)
    assert heard == [LAST]
