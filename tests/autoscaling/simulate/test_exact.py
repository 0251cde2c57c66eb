"""The fluid against replicas that are run step by step and request by request.

Tolerances: tokens and requests to the last digit; what runs on average within 8%; the median of the time to the first
token within 20%, its 90th percentile within 30%, where there are seats.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from paceline.autoscaling.simulate.cluster import Conditions, Simulation
from paceline.autoscaling.simulate.generators import Sessions, _drawn
from paceline.autoscaling.simulate.histogram import quantile
from paceline.autoscaling.simulate.policies import Fixed
from paceline.autoscaling.simulate.profile import load
from paceline.autoscaling.simulate.record import Record
from paceline.autoscaling.simulate.traces import Requests
from tests.autoscaling.simulate.exact import Outcome, simulate

SECONDS = 500
PROFILE = load("llama-8b-h100").model_copy(update={"drafts": None})
CASES = ((3.0, 1), (9.0, 1), (16.0, 2))


class Both(NamedTuple):
    requests: Requests
    exact: Outcome
    fluid: Record
    mean_running: float


@cache
def both(rate: float, replicas: int) -> Both:
    rng = np.random.default_rng(3)
    requests = _drawn(rng.poisson(rate, SECONDS).astype(float), 1.0, rng, Sessions(0.0, 0.0))
    conditions = Conditions(PROFILE, 1.0, 0.1, initial=replicas, max_replicas=replicas)
    simulation = Simulation(conditions, requests.ticks(1.0, "x", SECONDS), Fixed(replicas))
    fluid = simulation.run()
    return Both(requests, simulate(PROFILE, requests, replicas), fluid, float(fluid["sequences"].sum()) / SECONDS)


@pytest.mark.parametrize(("rate", "replicas"), CASES)
def test_as_many_tokens_are_made(rate: float, replicas: int) -> None:
    found = both(rate, replicas)
    assert found.fluid["tokens"].sum() == pytest.approx(found.exact.tokens, rel=1e-5)


@pytest.mark.parametrize(("rate", "replicas"), CASES)
def test_as_many_sequences_run(rate: float, replicas: int) -> None:
    found = both(rate, replicas)
    assert found.mean_running == pytest.approx(found.exact.mean_running, rel=0.08)


@pytest.mark.parametrize(("rate", "replicas"), CASES)
@pytest.mark.parametrize(("q", "tolerance"), [(0.5, 0.2), (0.9, 0.3)])
def test_first_tokens_come_as_late(rate: float, replicas: int, q: float, tolerance: float) -> None:
    found = both(rate, replicas)
    assert quantile(found.fluid.ttft.sum(axis=0), q) == pytest.approx(
        np.quantile(found.exact.first_tokens, q), rel=tolerance
    )


def test_a_queue_that_grows_is_as_long() -> None:
    found = both(18.0, 1)  # a third more than a replica does
    assert quantile(found.fluid.ttft.sum(axis=0), 0.5) == pytest.approx(
        np.quantile(found.exact.first_tokens, 0.5), rel=0.15
    )
