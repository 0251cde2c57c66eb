"""Speculation changes no token: whatever the source, the depth, the batch and the sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.engine.engine import Engine
from paceline.engine.verify_cost import ROWS, measure_verify_cost
from paceline.speculation.local import LocalProposer
from paceline.speculation.proposer import Proposer
from paceline.types import FinishReason, Metrics
from tests import tiny

MODEL = tiny.tiny_llama()
OTHER = tiny.tiny_llama(seed=7)
TOKENS = 24
PHRASE = tiny.prompt(12, seed=3)
PROMPTS = [(*tiny.prompt(n, seed=n), *PHRASE, *tiny.prompt(3, seed=50 + n), *PHRASE[:6]) for n in range(16)]
"""Each ends in a phrase it has used before, so that prompt lookup has something to say from the start."""

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    "penalties": {"temperature": 0.8, "seed": 5, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "minimum and bias": {"temperature": 0.8, "seed": 5, "min_tokens": 8, "logit_bias": {4: 2.0, 9: -3.0}},
    "log probabilities": {"temperature": 0.8, "seed": 5, "logprobs": 2, "prompt_logprobs": 1},
}
SOURCES: dict[str, dict[str, Any]] = {
    "agreeing draft": {"draft": MODEL, "depth": 4},
    "disagreeing draft": {"draft": OTHER, "depth": 4},
    "lookup": {"lookup": 8, "depth": 8},
    "mixed": {"draft": OTHER, "lookup": 8, "depth": 5},
    "adaptive lookup": {"lookup": 8, "depth": "auto"},
    "adaptive": {"draft": OTHER, "lookup": 8, "depth": "auto"},
    "adaptive with a good draft": {"draft": MODEL, "lookup": 3, "depth": "auto", "max_depth": 16},
}


def engine(**options: Any) -> Engine:
    draft = options.pop("draft", None)
    proposer: Proposer | None = LocalProposer(tiny.drafter_for(draft, 16384)) if draft is not None else None
    return tiny.engine_for(MODEL, proposer=proposer, capacity=16384, max_num_seqs=16, max_batched_tokens=256, **options)


def answers(engine: Engine, batch: int, count: int = 16, **params: Any) -> list[tuple[Any, ...]]:
    """Everything that is told of the answers to the first `count` prompts, in runs of `batch`."""
    found: dict[str, list[Any]] = {}
    for start in range(0, count, batch):
        for n, tokens in enumerate(PROMPTS[start : start + batch], start=start):
            engine.add(tiny.request(tokens, str(n), **{"max_tokens": TOKENS, **params}))
        for name, delta in tiny.deltas(engine):
            each = found.setdefault(name, [[], [], [], None])
            each[0] += delta.token_ids
            each[1] += [logprob.token_id for logprob in delta.logprobs]
            each[2] += [logprob.token_id for logprob in delta.prompt_logprobs]
            each[3] = delta.finish_reason
        engine.check()
    return [tuple(found[str(n)]) for n in range(count)]


def metrics_of(engine: Engine, *requests: tiny.Request) -> list[Metrics]:
    for each in requests:
        engine.add(each)
    return [delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[tuple[Any, ...]]]:
    return {name: answers(engine(), 16, **params) for name, params in SAMPLING.items()}


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (16, 16)], ids=["alone", "batch of 16"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("sources", SOURCES)
def test_no_source_changes_an_answer(
    plain: dict[str, list[tuple[Any, ...]]], sources: str, sampling: str, batch: int, count: int
) -> None:
    assert answers(engine(**SOURCES[sources]), batch, count, **SAMPLING[sampling]) == plain[sampling][:count]


@pytest.mark.parametrize("sources", SOURCES)
def test_an_end_inside_an_accepted_run_ends_there(sources: str) -> None:
    bare = tiny.generate(MODEL, PROMPTS[5], 200)
    for place in (3, 17, 40):
        stop = {"stop_token_ids": (bare[place],), "max_tokens": 200}
        expected = bare[: bare.index(bare[place]) + 1]
        assert tiny.run(engine(**SOURCES[sources]), tiny.request(PROMPTS[5], **stop))["r"] == expected


@pytest.mark.parametrize("room", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("sources", SOURCES)
def test_max_tokens_is_met_exactly(sources: str, room: int) -> None:
    speculating = engine(**SOURCES[sources])
    speculating.add(tiny.request(PROMPTS[5], max_tokens=room))
    found = [delta for _, delta in tiny.deltas(speculating)]
    assert sum(len(delta.token_ids) for delta in found) == room
    assert found[-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_declines_speculation_gets_no_candidates() -> None:
    speculating = engine(lookup=8, depth=8)
    request = tiny.request(PROMPTS[5], max_tokens=200)
    (metrics,) = metrics_of(speculating, tiny.Request("r", request.token_ids, request.params, speculate=False))
    assert (metrics.drafted, metrics.late, metrics.steps) == (0, 0, 199)


def test_a_repeating_answer_is_drafted_by_lookup() -> None:
    (metrics,) = metrics_of(engine(lookup=8, depth=8), tiny.request(PROMPTS[5], max_tokens=400))
    assert metrics.accepted > 0
    assert metrics.steps + metrics.accepted == 399


def test_an_engine_leaves_no_state_of_ended_sequences() -> None:
    speculating = engine(draft=OTHER, lookup=8, depth="auto")
    answers(speculating, 16)
    speculating.add(tiny.request(PROMPTS[0], "cancelled"))
    speculating.step()
    speculating.step()
    speculating.abort("cancelled")
    assert speculating.speculator is not None
    assert speculating.speculator._states == {}


# Synthetic acceptance.


def synthetic(probability: float, **options: Any) -> Metrics:
    speculating = engine(draft=OTHER, synthetic_acceptance=probability, **options)
    (metrics,) = metrics_of(speculating, tiny.request(PROMPTS[5], max_tokens=400, seed=1, ignore_eos=True))
    speculating.check()
    return metrics


def test_a_synthetic_acceptance_of_one_accepts_everything() -> None:
    metrics = synthetic(1.0, depth=4)
    assert metrics.accepted == metrics.drafted == pytest.approx(400 * 4 / 5, abs=4)


def test_a_synthetic_acceptance_of_zero_accepts_nothing() -> None:
    metrics = synthetic(0.0, depth=4)
    assert (metrics.accepted, metrics.steps) == (0, 399)


def test_synthetic_acceptance_is_what_was_asked_for() -> None:
    metrics = synthetic(0.7, depth=1)
    assert metrics.accepted / metrics.drafted == pytest.approx(0.7, abs=0.08)


def test_synthetic_acceptance_is_seeded() -> None:
    assert synthetic(0.7, depth=3).steps == synthetic(0.7, depth=3).steps


def test_a_refused_candidate_is_never_what_follows() -> None:
    """Not even where the target would have said it: whoever learns from what came must see the refusal."""
    speculating = engine(draft=MODEL, depth=1, synthetic_acceptance=0.0)
    found = tiny.run(speculating, tiny.request(PROMPTS[5], max_tokens=8, seed=1))["r"]
    assert found[1] != tiny.generate(MODEL, PROMPTS[5], 8)[1]


# The curve measured at start-up.


def ticks(step: float) -> Any:
    now = [0.0]

    def clock() -> float:
        now[0] += step
        return now[0]

    return clock


def test_the_cost_of_rows_is_measured_on_a_cache_of_its_own() -> None:
    cost = measure_verify_cost(tiny.ours(MODEL), clock=ticks(1e-4))
    assert [cost.curve(rows) for rows in ROWS] == [pytest.approx(1e-4)] * len(ROWS)


def test_a_slow_model_is_left_with_a_coarse_curve() -> None:
    cost = measure_verify_cost(tiny.ours(MODEL), budget_s=0.5, clock=ticks(1.0))
    assert cost._rows == [1, 8]


class Compiling:
    """A runner on a GPU whose kernels take a second at the first step of a shape, and a millisecond later."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.now = 0.0
        self._runner = tiny.ours(MODEL)
        self._shapes: set[tuple[int, ...]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, windows: list[Any]) -> torch.Tensor:
        shape = tuple(len(window.token_ids) for window in windows)
        self.now += 0.001 if shape in self._shapes else 1.0
        self._shapes.add(shape)
        return self._runner.run(windows)


def test_what_kernels_take_to_be_compiled_is_no_cost_of_rows_or_windows() -> None:
    runner = Compiling()
    cost = measure_verify_cost(runner, clock=lambda: runner.now)  # type: ignore[arg-type]
    assert [cost.curve(rows, windows) for rows, windows in ((1, 1), (8, 8), (64, 8))] == [pytest.approx(0.001)] * 3


def test_a_context_shorter_than_the_probe_is_measured_too() -> None:
    assert measure_verify_cost(tiny.ours(tiny.tiny_llama(max_position_embeddings=16))).curve(1) > 0


def test_under_rejection_a_draft_in_this_process_brings_its_distributions() -> None:
    """A draft like its target is never refused: p / q is 1. Candidates without q would stand with p alone."""
    proposer = LocalProposer(tiny.drafter_for(MODEL), rejection=True)
    engine = tiny.engine_for(MODEL, proposer=proposer, verification="rejection")
    tiny.run(engine, tiny.request(tiny.prompt(20), temperature=1.0, top_k=8, seed=5, max_tokens=40))
    assert engine.tally.drafted > 20
    assert engine.tally.accepted >= engine.tally.drafted - 4  # those behind the end
