"""The policy as a whole."""

from __future__ import annotations

import random
import sys
from dataclasses import fields, replace
from itertools import pairwise
from math import inf, nan

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.snapshot import Decision, DraftLoad, Pool, Reason, Snapshot, TargetLoad
from paceline.config_autoscaling import AutoscalingSettings
from tests.autoscaling.pools import BUSY, Pools, drafters, sequences, settings, targets


def _odd(load: TargetLoad | DraftLoad) -> st.SearchStrategy:
    """With a few numbers in it that mean something else, or nothing."""
    names = st.sampled_from([each.name for each in fields(load)[1:]])
    return st.dictionaries(names, NUMBERS, max_size=4).map(lambda numbers: replace(load, **numbers))


NUMBERS = st.one_of(
    st.none(), st.floats(0, 1e4), st.floats(), st.sampled_from([nan, inf, -inf, -1.0, 0.0, 5e-324, 1e300])
)
ODD_TARGETS = st.lists(_odd(BUSY), max_size=3).map(tuple)
ODD_DRAFTS = st.lists(_odd(DraftLoad("d", 0.5, 100.0, 8.0, 60.0)), max_size=2).map(tuple)
LOOKS = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 100), st.floats()),
        ODD_TARGETS,
        ODD_DRAFTS,
    ),
    min_size=1,
    max_size=6,
)
PRESETS = st.sampled_from(["latency", "throughput", "cost"])


def follow(policy: LoadPolicy, looks: list, num_targets: int, num_drafts: int) -> list[tuple[Decision, Decision]]:
    made = []
    for now, seen_targets, seen_drafts in looks:
        decisions = policy.decide(Snapshot(now, num_targets, num_drafts, seen_targets, seen_drafts))
        num_targets, num_drafts = decisions.target.replicas, decisions.draft.replicas
        made.append((decisions.target, decisions.draft))
    return made


@hypothesis.settings(max_examples=50)
@given(LOOKS, PRESETS, st.integers(0, 50), st.integers(0, 50))
def test_whatever_is_reported_the_bounds_hold(looks: list, preset: str, num_targets: int, num_drafts: int):
    policy = LoadPolicy(settings(2, 20, (1, 8), preset=preset))
    for target, draft in follow(policy, looks, num_targets, num_drafts):
        assert 2 <= target.replicas <= 20
        assert 1 <= draft.replicas <= 8


@hypothesis.settings(max_examples=50)
@given(LOOKS, st.integers(1, 60))
def test_whatever_is_reported_steps_hold(looks: list, num_targets: int):
    policy = LoadPolicy(settings(1, 10_000, upscale_delay_s=0, downscale_delay_s=0))
    for target, _ in follow(policy, looks, num_targets, 0):
        assert target.replicas <= max(target.before * 2, target.before + 4)
        assert target.replicas >= target.before - max(1, target.before // 4)


@hypothesis.settings(max_examples=50)
@given(LOOKS)
def test_whatever_is_reported_a_sentence_says_why(looks: list):
    for pair in follow(LoadPolicy(settings()), looks, 1, 1):
        for made in pair:
            assert made.text
            assert "\n" not in made.text


LOAD_FIELDS = [
    "running",
    "waiting",
    "queued_prefill_tokens",
    "prompt_tokens_per_s",
    "kv_in_use",
    "ttft_p95_s",
    "itl_p95_s",
]


@given(
    st.dictionaries(st.sampled_from(LOAD_FIELDS), st.floats(0, 1e4)),
    st.sampled_from(LOAD_FIELDS),
    st.floats(1, 10),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_more_load_never_gives_fewer(base: dict[str, float], name: str, times: float, before: int, reported: int):
    def replicas(numbers: dict[str, float]) -> int:
        policy = LoadPolicy(settings(1, 1000, upscale_delay_s=0, downscale_delay_s=0))
        return policy.decide(Snapshot(0.0, before, 0, targets(reported, **numbers))).target.replicas

    low = {"running": 1.0, "kv_in_use": 0.05, **base}
    high = {**low, name: times * low.get(name, getattr(BUSY, name))}
    assert replicas(high) >= replicas(low)


@hypothesis.settings(max_examples=30)
@given(st.integers(0, 99), st.sampled_from([-1e12, 1e12, 3600.0, -5.0]), st.floats(1, 100))
def test_a_jump_of_the_clock_changes_nothing(moment: int, jump: float, load: float):
    def counts(jumped: float) -> list[int]:
        run = Pools(LoadPolicy(settings(1, 20, downscale_delay_s=30)), num_targets=4)
        for second in range(100):
            if second == moment:
                run.now += jumped
            run.look(sequences(load if second < 40 else 1))
        return [made.target.replicas for made in run.made]

    assert counts(jump) == counts(0.0)


@pytest.mark.parametrize("preset", ["latency", "throughput", "cost"])
@pytest.mark.parametrize("load", [3.0, 12.8, 25.7, 64.0, 130.0, 700.0])
def test_a_steady_load_never_flaps(preset: str, load: float):
    dice = random.Random(f"{preset} {load}")
    run = Pools(LoadPolicy(settings(1, 200, preset=preset)))
    for _ in range(1000):
        run.look(sequences(load * dice.uniform(0.9, 1.1)))
    counts = [made.target.replicas for made in run.made]
    assert counts == sorted(counts)


@pytest.mark.parametrize("preset", ["latency", "throughput", "cost"])
def test_after_a_burst_everything_returns(preset: str):
    run = Pools(LoadPolicy(settings(1, 50, preset=preset)))
    run.run(60, sequences(200, wanted=200, saved=5.0, computed=2.0))
    assert run.num_targets > 5
    run.run(1500, sequences(0))
    assert (run.num_targets, run.num_drafts) == (1, 0)


def test_a_burst_is_the_seats_reason_and_its_end_is_idle():
    run = Pools(LoadPolicy(settings(1, 3)))
    run.run(30, sequences(60))
    run.run(400, sequences(0))
    assert {made.target.reason for made in run.made if made.target.changes} == {Reason.SEATS, Reason.IDLE}


def test_a_wish_beyond_the_most_says_so():
    run = Pools(LoadPolicy(settings(1, 3, upscale_delay_s=0)))
    made = run.run(30, sequences(160)).target
    assert (made.reason, made.text) == (
        Reason.BOUNDS,
        "48 of 48 seats in use, 112 sequences waiting on 3 replicas, 0.8 wanted: 12.5 needed, and 3 are the most",
    )


def test_a_pool_that_reports_nothing_stays():
    made = LoadPolicy(settings()).decide(Snapshot(0, 7, 0)).target
    assert (made.replicas, made.reason) == (7, Reason.UNKNOWN)


def test_a_pool_that_falls_silent_stays():
    run = Pools(LoadPolicy(settings(1, 20)))
    run.run(300, sequences(60))
    before = run.num_targets
    run.run(3000, lambda _: ((), ()))
    assert run.num_targets == before


def test_replicas_that_start_do_not_make_others_start():
    run = Pools(LoadPolicy(settings(1, 100, upscale_delay_s=0)))
    run.run(300, lambda _: (targets(1, running=16, waiting=16), ()))
    assert run.num_targets == 3


def test_a_pool_of_none_comes_back_to_the_fewest():
    made = LoadPolicy(settings(2)).decide(Snapshot(0, 0, 0)).target
    assert (made.replicas, made.reason) == (2, Reason.BOUNDS)


def test_load_that_rises_is_met_before_it_comes():
    run = Pools(LoadPolicy(settings(1, 200, start_s=300.0, upscale_delay_s=0)), num_targets=10)
    for second in range(900):
        run.look(sequences(100 + second / 2))
    assert Reason.FORECAST in {made.target.reason for made in run.made}
    assert run.num_targets > 550 / 16 / 0.8 * 1.15


def test_every_signal_is_shown():
    signals = LoadPolicy(settings()).decide(Snapshot(0, 2, 1, targets(2), drafters(1))).signals
    assert {reason for pool, reason in signals if pool is Pool.TARGET} == {
        Reason.SEATS,
        Reason.KV,
        Reason.PREFILL,
        Reason.TTFT,
        Reason.ITL,
        Reason.FORECAST,
    }
    assert signals[Pool.TARGET, Reason.SEATS] == pytest.approx((1.0 + 0.2) / 0.8)


def test_a_field_alone_never_disturbs_the_others():
    for each in fields(TargetLoad)[1:]:
        odd = replace(BUSY, **{each.name: nan})
        assert LoadPolicy(settings()).decide(Snapshot(0, 1, 0, (odd,))).target.replicas == 1


def test_the_settings_as_they_come_are_enough():
    assert LoadPolicy(AutoscalingSettings(), cpu=True).decide(Snapshot(0, 1, 0, targets(1))).target.replicas == 1


def test_the_policy_needs_neither_ray_nor_torch_nor_numpy():
    import subprocess

    said = "import sys, paceline.autoscaling.load_policy, paceline.autoscaling.victims; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "numpy"} & set(done.stdout.split())


def test_counts_never_move_twice_within_a_step():
    run = Pools(LoadPolicy(settings(1, 500, upscale_delay_s=0)), num_targets=4)
    run.run(9, sequences(5000))
    counts = [made.target.replicas for made in run.made]
    assert max(counts) == 8
    assert all(before <= after for before, after in pairwise(counts))
