from __future__ import annotations

import numpy as np
import pytest

from paceline.autoscaling.simulate.histogram import binned, mean, quantile
from paceline.autoscaling.simulate.profile import Array, Pace, load
from paceline.autoscaling.simulate.replicas import Coming, Replicas, Tick, nothing
from paceline.autoscaling.simulate.routing import level_out

GPU = load("llama-8b-h100")
PLAIN = GPU.model_copy(update={"drafts": None})


def group(count: int = 1, tick: float = 1.0, drafts: bool = False) -> Replicas:
    replicas = Replicas(Pace(GPU if drafts else PLAIN), tick, 16)
    replicas.add(count)
    return replicas


def coming(requests: float, prompt: float = 1000.0, output: float = 200.0, count: int = 1) -> Coming:
    each = np.full(count, requests)
    return Coming(each, each * prompt, each * prompt, each * output)


def totals(ticks: list[Tick]) -> tuple[float, float, float]:
    return (
        sum(float(tick.completed.sum()) for tick in ticks),
        sum(float(tick.tokens.sum()) for tick in ticks),
        sum(float(tick.prefilled.sum()) for tick in ticks),
    )


@pytest.mark.parametrize("tick", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("rate", [0.5, 8.0, 30.0])
def test_requests_and_tokens_are_conserved(tick: float, rate: float) -> None:
    replicas = group(3, tick)
    ticks = [replicas.tick(coming(rate * tick, count=3), 0.0) for _ in range(20)]
    ticks += [replicas.tick(nothing(3), 0.0) for _ in range(round(400 / tick))]
    asked = 20 * 3 * rate * tick
    assert totals(ticks) == pytest.approx((asked, 200 * asked, 1000 * asked), rel=1e-6)


def test_nothing_is_below_zero() -> None:
    replicas, rng = group(4), np.random.default_rng(0)
    for _ in range(200):
        came = rng.poisson(rng.choice([0, 3, 40]), 4).astype(float)
        replicas.tick(Coming(came, 900 * came, 1500 * came, 100 * came), 0.0)
        assert replicas.state.min() >= 0.0


def test_no_more_run_than_there_are_seats() -> None:
    replicas = group()
    for _ in range(100):
        replicas.tick(coming(30.0, prompt=10.0), 0.0)
    assert replicas["running"][0] <= 1.02 * PLAIN.max_num_seqs


def test_no_more_kv_is_used_than_there_is() -> None:
    small = PLAIN.model_copy(update={"kv_tokens": 20_000})
    replicas = Replicas(Pace(small), 1.0, 1)
    replicas.add(1)
    most = 0.0
    for _ in range(100):
        replicas.tick(coming(20.0), 0.0)
        most = max(most, float(replicas["kv"][0]))
    assert 0.5 * 20_000 < most < 1.2 * 20_000


def test_prompts_slow_the_steps() -> None:
    itl = []
    for prompt in (10.0, 2000.0):
        replicas = group()
        itl.append(float([replicas.tick(coming(5.0, prompt), 0.0) for _ in range(60)][-1].itl[0]))
    assert itl[1] > 1.3 * itl[0]


def test_drafts_bring_more_tokens_from_fewer_steps() -> None:
    running = []
    for served in (0.0, 1.0):
        replicas = group(drafts=True)
        for _ in range(60):
            replicas.tick(coming(8.0), served)
        running.append(float(replicas["running"][0]))
    assert running[1] < running[0] / 2


def test_drafts_are_wanted_where_none_are_there() -> None:
    replicas = group(drafts=True)
    assert [replicas.tick(coming(8.0), 0.0) for _ in range(5)][-1].wanted[0] > 1.0


def test_a_queue_waits_as_long_as_it_takes_to_compute_it() -> None:
    replicas = group()
    done = [replicas.tick(coming(60.0, prompt=2000.0, output=1.0), 0.0)]
    done += [replicas.tick(nothing(1), 0.0) for _ in range(20)]
    longest = max(float(tick.waits.wait[tick.waits.weight > 0.01].max(initial=0.0)) for tick in done)
    came = 1.0  # they came in the course of a tick
    assert longest == pytest.approx(60 * 2000 / PLAIN.prefill_tokens_per_s - came, rel=0.1)


def test_who_was_refused_before_has_waited_longer() -> None:
    replicas = group()
    came = coming(2.0)
    done = replicas.tick(Coming(came.requests, came.prompt, came.context, came.output, refused_s=7.0), 0.0)
    assert done.waits.wait.tolist() == [7.0]


def test_those_that_go_hand_over_what_they_hold() -> None:
    replicas = group(3)
    replicas.tick(coming(4.0, count=3), 0.0)
    before = replicas["running"].sum()
    held = replicas.keep(np.array([True, False, True]))
    assert held[4] + replicas["running"].sum() == pytest.approx(before)


def shared(load: list[float], amount: float, room: float = 1e9) -> Array:
    return level_out(np.array(load), amount, np.full(len(load), room))


def test_the_least_loaded_get_what_levels_them() -> None:
    assert shared([0.0, 4.0, 10.0], 8.0) == pytest.approx([6.0, 2.0, 0.0], abs=0.01)


def test_who_takes_no_requests_gets_none() -> None:
    assert shared([0.0, np.inf], 3.0).tolist() == [3.0, 0.0]


def test_nobody_gets_more_than_there_is_room_for() -> None:
    assert shared([0.0, 10.0, 10.0], 8.0, room=4.0) == pytest.approx([4.0, 2.0, 2.0])


def test_a_quantile_lies_within_a_bin_of_the_exact_one() -> None:
    values = np.random.default_rng(0).lognormal(0.0, 1.0, 20_000)
    assert quantile(binned(values, np.ones_like(values)), 0.95) == pytest.approx(np.quantile(values, 0.95), rel=0.03)


def test_a_mean_lies_within_a_bin_of_the_exact_one() -> None:
    values = np.random.default_rng(0).lognormal(0.0, 1.0, 20_000)
    assert mean(binned(values, np.ones_like(values))) == pytest.approx(values.mean(), rel=0.03)


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile(binned(np.zeros(0), np.zeros(0)), 0.5) is None
