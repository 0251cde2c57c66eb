"""The shared vocabulary refuses what makes no sense, and says which field it was."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from paceline.errors import EngineError, InvalidRequest, Overloaded
from paceline.types import (
    MAX_SEED,
    MAX_STOP_STRINGS,
    Delta,
    Failure,
    FinishReason,
    Metrics,
    Request,
    SamplingParams,
)

WRONG: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (0, -1, 1.5, "9", True)),
    *(("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf, 10**400, "1", True, None)),
    *(("top_p", value) for value in (0, 0.0, -1, 1.01, math.nan, "1", None)),
    *(("top_k", value) for value in (-1, 1.0, True, None)),
    *(("min_p", value) for value in (-0.1, 1.1, math.nan, None)),
    *(("seed", value) for value in (MAX_SEED + 1, -(2**63) - 1, 1.0, "1", True)),
    *(("stop", value) for value in ((""), ("a", ""), (1,), 5, None, ("x",) * (MAX_STOP_STRINGS + 1))),
    *(("stop_token_ids", value) for value in ((-1,), (1.5,), ("a",), (True,), 5, None)),
]
RIGHT: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (1, 10**6, None)),
    *(("temperature", value) for value in (0, 0.0, 1, 100)),
    *(("top_p", value) for value in (1e-9, 1)),
    *(("top_k", value) for value in (0, 1, 10**9)),
    *(("min_p", value) for value in (0, 1)),
    *(("seed", value) for value in (0, MAX_SEED, -(2**63), None)),
    *(("stop", value) for value in ((), ("a",), ("x",) * MAX_STOP_STRINGS)),
    *(("stop_token_ids", value) for value in ((), (0, 5))),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_parameter_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(("field", "value"), RIGHT)
def test_a_parameter_at_its_bounds_is_taken(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_lists_become_tuples() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a",), (1,))


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-6, True), (1e-5, False), (1.0, False)])
def test_greedy_is_no_temperature_or_next_to_none(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_a_given_seed_stays() -> None:
    params = SamplingParams(seed=0)
    assert params.with_seed() is params


def test_a_missing_seed_is_drawn_afresh() -> None:
    first, second = SamplingParams().with_seed().seed, SamplingParams().with_seed().seed
    assert first is not None and 0 <= first < 2**63
    assert first != second


def test_parameters_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("tokens", [(), (1.5,), ("a",), 5, None], ids=str)
def test_a_wrong_prompt_is_refused_by_name(tokens: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: ") as caught:
        Request("r", tokens, SamplingParams())
    assert caught.value.param == "prompt"


def test_token_ids_of_any_integer_type_are_taken() -> None:
    assert Request("r", np.array([3, 4]), SamplingParams()).token_ids == (3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        Request("r", (1, 2), SamplingParams(stop=("x",)), "s", False),
        Delta((1,), "a", FinishReason.STOP, Metrics(prompt_tokens=3)),
        Failure("timeout", "too slow", "p", 1.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_survives_pickling(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(("reason", "finished"), [(None, False), *((reason, True) for reason in FinishReason)])
def test_a_delta_with_a_reason_is_the_last(reason: FinishReason | None, finished: bool) -> None:
    assert Delta((1,), "a", reason).finished is finished


def test_finish_reasons_are_openais_words() -> None:
    assert (str(FinishReason.STOP), str(FinishReason.LENGTH)) == ("stop", "length")


def test_a_failure_becomes_the_error_it_was() -> None:
    error = Failure.of(Overloaded("full", param="p", retry_after=2.0)).error()
    assert (type(error), error.message, error.param, error.retry_after) == (Overloaded, "full", "p", 2.0)


def test_a_failed_step_stays_an_engine_error() -> None:
    assert type(Failure.of(EngineError("a step failed")).error()) is EngineError


def test_decode_speed_counts_what_follows_the_first_token() -> None:
    assert Metrics(completion_tokens=11, ttft_s=1.0, total_s=3.0).decode_tokens_per_s == 5.0


@pytest.mark.parametrize(
    "metrics", [Metrics(), Metrics(completion_tokens=1, total_s=1.0), Metrics(completion_tokens=5)]
)
def test_without_a_second_token_there_is_no_decode_speed(metrics: Metrics) -> None:
    assert metrics.decode_tokens_per_s == 0.0


def test_a_request_that_begins_has_no_output() -> None:
    request = Request("r", (1,), SamplingParams(n=2, seed=1))
    assert [choice.output for choice in request.choices()] == [(), ()]


def test_a_resumed_request_is_one_for_each_output_that_had_not_ended() -> None:
    request = Request("r", (1,), SamplingParams(n=4, seed=1), "s", resumed=((5, 6), None, (), (7,)))
    choices = request.choices()
    assert [(choice.request_id, choice.index, choice.output) for choice in choices] == [
        ("r", 0, (5, 6)),
        ("r/2", 2, ()),
        ("r/3", 3, (7,)),
    ]


def test_a_resumed_request_tells_of_every_output() -> None:
    with pytest.raises(InvalidRequest, match=r"^resumed: 1 outputs of 2") as caught:
        Request("r", (1,), SamplingParams(n=2, seed=1), resumed=((5,),))
    assert caught.value.param == "resumed"
