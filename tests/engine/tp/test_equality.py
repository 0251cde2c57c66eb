"""Two ranks, the other one a process of its own, answer token for token as one process does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.config import SpeculationSettings
from paceline.engine.engine import Engine
from paceline.engine.load import LoadedModel
from paceline.engine.products import Bf16
from paceline.models import ModelFiles, resolve
from paceline.speculation.local import LocalProposer
from paceline.types import Metrics, SamplingParams
from tests import tiny
from tests.engine.families import model_of
from tests.engine.tp.processes import folder_of, loaded
from tests.engine.tp.test_shares import step_by_step

REAL = "smollm2-135m"
FAMILIES = [REAL, "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Phi-3", pytest.param("GPT-NeoX", marks=pytest.mark.slow)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 11, "ignore_eos": True}
BOTH = pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
LENGTHS = (1, 5, 17, 40, 66, 90)
PROMPTS = Path(__file__).parents[2] / "data" / "held_out_prompts.json"


@dataclass(frozen=True)
class Pair:
    """The same weights on one rank and on two, and a text in their tokens."""

    one: LoadedModel
    two: LoadedModel
    text: tuple[int, ...]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if request.param == REAL:
        path = request.getfixturevalue("smollm2").path
    else:
        path = folder_of(tmp_path_factory.mktemp("model"), model_of(request.param))
    with loaded(path, 1, max_batched_tokens=64) as one, loaded(path, 2, max_batched_tokens=64) as two:
        yield Pair(one, two, real_text(one) if request.param == REAL else tiny.prompt(400, seed=1))


def real_text(model: LoadedModel) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(" ".join(json.loads(PROMPTS.read_text())["chat"]))[:400])


def requests(text: tuple[int, ...], **params: Any) -> list[tiny.Request]:
    """Six, of different lengths and seeds, none the beginning of another."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    return [
        tiny.request(text[start : start + length], f"r{n}", **params | ({"seed": n} if "seed" in params else {}))
        for n, (start, length) in enumerate(zip(starts, LENGTHS, strict=True))
    ]


def turn(engine: Engine, text: tuple[int, ...]) -> tuple[list[int], int]:
    """The session's next answer, and how much of the text was there already."""
    engine.add(tiny.request(text, session="s", max_tokens=16, **GREEDY))
    found = [delta for _, delta in tiny.deltas(engine)]
    engine.kv.check()
    (metrics,) = [delta.metrics for delta in found if delta.metrics is not None]
    assert isinstance(metrics, Metrics)
    return [token for delta in found for token in delta.token_ids], metrics.cached_tokens


@BOTH
def test_a_request_is_answered_alike(pair: Pair, params: dict[str, Any]) -> None:
    request = tiny.request(pair.text[:40], max_tokens=32, **params)
    expected = tiny.run(pair.one.engine(), request)
    assert tiny.run(pair.two.engine(), request) == expected
    assert len(set(expected["r"])) > 3  # what always says the same would prove nothing


@BOTH
def test_a_batch_is_answered_alike(pair: Pair, params: dict[str, Any]) -> None:
    each = requests(pair.text, max_tokens=16, **params)
    assert tiny.run(pair.two.engine(), *each) == tiny.run(pair.one.engine(), *each)


@BOTH
def test_candidates_of_a_draft_change_no_token(pair: Pair, params: dict[str, Any]) -> None:
    request = tiny.request(pair.text[:40], max_tokens=32, **params)
    speculation = SpeculationSettings(depth=4, prompt_lookup_num_tokens=0)
    engine = pair.two.engine(LocalProposer(pair.one.drafter()), speculation, tiny.flat_cost())
    assert tiny.run(engine, request) == tiny.run(pair.one.engine(), request)
    assert engine.tally.accepted > engine.tally.steps


def test_candidates_from_the_text_itself_change_no_token(pair: Pair) -> None:
    request = tiny.request(pair.text[:20] * 3, max_tokens=48, **SEEDED)
    engine = pair.two.engine(None, SpeculationSettings(depth=4, prompt_lookup_num_tokens=4), tiny.flat_cost())
    assert tiny.run(engine, request) == tiny.run(pair.one.engine(), request)
    assert engine.tally.drafted > 0


@BOTH
def test_a_text_three_times_as_long_as_its_window_is_the_same(pair: Pair, params: dict[str, Any]) -> None:
    request = tiny.request(pair.text[:20], max_tokens=80, ctx_size=32, n_keep=4, **params)
    assert tiny.run(pair.two.engine(), request) == tiny.run(pair.one.engine(), request)


def test_the_second_turn_of_a_session_is_the_same_and_not_computed_twice(pair: Pair) -> None:
    one, two = pair.one.engine(), pair.two.engine()
    first = turn(one, pair.text[:40])
    assert turn(two, pair.text[:40]) == first
    text = (*pair.text[:40], *first[0], *pair.text[40:60])
    second = turn(one, text)
    assert turn(two, text) == second
    assert second[1] >= 40


def test_a_session_handed_to_one_rank_and_back_goes_on_with_the_same_tokens(pair: Pair) -> None:
    alone, here, there = pair.one.engine(), pair.two.engine(), pair.one.engine()
    text = pair.text[:40]
    for _ in range(3):
        expected = turn(alone, text)
        assert turn(here, text) == expected
        text = (*text, *expected[0], *pair.text[40:50])
        export = here.kv.export_session("s")
        assert export is not None and there.kv.import_session(export)
        here, there = there, here


NEEDS_BF16 = pytest.mark.skipif(Bf16().missing() is not None, reason=str(Bf16().missing()))
ROUNDED = [
    pytest.param({"weight_dtype": "int8", "kv_dtype": "int8"}, 2e-2, id="int8"),
    pytest.param({"weight_dtype": "int4"}, 1e-3, id="int4"),
    pytest.param({"linear_backend": "fbgemm_fp16"}, 1e-2, id="fp16"),
    pytest.param({"linear_backend": "bf16"}, 0.1, id="bf16", marks=NEEDS_BF16),
]


@pytest.mark.parametrize(("settings", "tolerance"), ROUNDED)
def test_what_is_rounded_is_rounded_alike(tmp_path: Path, settings: dict[str, Any], tolerance: float) -> None:
    model = tiny.tiny_llama(hidden_size=192, intermediate_size=256)
    path = folder_of(tmp_path, model)
    with loaded(path, 1, **settings) as one, loaded(path, 2, **settings) as two:
        expected, found = (step_by_step(each.runner, each.kv_geometry) for each in (one, two))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.std()))


def test_a_distilled_draft_drafts_the_same(smollm2: ModelFiles) -> None:
    path = resolve("smollm2-135m-draft").path
    with loaded(path, 1) as one, loaded(path, 2) as two:
        assert drafted(two) == drafted(one)


def drafted(model: LoadedModel) -> list[int]:
    drafter = model.drafter()
    drafter.open("a", tuple(range(1000, 1060)), SamplingParams(temperature=0.8, seed=3), 16)
    tokens: list[int] = []
    while drafter.has_work:
        tokens += [token for answer in drafter.step() for token in answer.tokens]
    return tokens
