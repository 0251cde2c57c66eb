"""Sequences that outgrow their context: what is dropped, how keys follow, and that nothing else changes a token."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config, SmolLM3Config

from paceline.engine.attention import Window
from paceline.engine.engine import Engine
from paceline.engine.kv_cache import KVEntry, KVExport, SlabKVCache
from paceline.engine.runner import Runner
from paceline.errors import InvalidRequest
from paceline.models.positions import shift_refusal
from paceline.sessions.window import StreamingWindow
from paceline.speculation.local import LocalProposer
from paceline.types import Metrics
from tests import tiny
from tests.engine.families import FAMILIES, model_of, runner_of
from tests.engine.test_lean import SHAPE, built, lean

MODEL = tiny.tiny_llama()
OTHER = tiny.tiny_llama(seed=7)
SMALL = tiny.tiny_llama(num_hidden_layers=1, hidden_size=24, num_attention_heads=4)
WINDOW = StreamingWindow(32, 4)
IN_WINDOW: dict[str, Any] = {"ctx_size": 32, "n_keep": 4, "n_discard": -1}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
PHRASE = tiny.prompt(9, seed=3)
PROMPTS = [(*tiny.prompt(n, seed=n), *PHRASE, *tiny.prompt(3, seed=50 + n), *PHRASE[:5]) for n in (1, 9, 33, 90)]
"""Some are longer than the window; each ends in a phrase it has used before."""
TOKENS = 70
LEAN = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=2),
    "llama-wide-heads": LlamaConfig(**SHAPE | {"hidden_size": 128, "num_attention_heads": 2}, head_dim=64),
}
POSITIONS = {family.name: family.positions for family in FAMILIES}
LEARNED = [name for name, positions in POSITIONS.items() if positions == "learned"]
ALIBI = [name for name, positions in POSITIONS.items() if positions == "ALiBi"]
TABLES = ["GPT-J", "CodeGen"]
"""Their rotations are looked up, so that no text may begin before position 0."""
PLAIN: dict[str, Any] = {"ctx_size": None, "n_keep": None, "n_discard": None}
ROTARY = [name for name in POSITIONS if name not in (*LEARNED, *ALIBI, *TABLES, "Llama 4 (text)")]


def filled(runner: Runner, ids: tuple[int, ...], *, quantized: bool = False) -> tuple[SlabKVCache, KVEntry]:
    """An entry whose window is full."""
    kv = tiny.kv_for(runner, quantized=quantized)
    entry = kv.reserve(ids, len(ids), window=StreamingWindow(len(ids), 4))
    assert entry is not None
    runner.run([Window(entry, ids, sample=1)])
    kv.append(entry, ids)
    return kv, entry


@torch.inference_mode()
def keys_of(model: PreTrainedModel, ids: tuple[int, ...], first: int) -> list[torch.Tensor]:
    """What the model itself makes of the tokens if the first stands at position `first`: keys by layer.

    Only distances count in attention, so that all but the keys' rotation is the same wherever the text begins.
    """
    stored = DynamicCache()
    positions = torch.arange(first, first + len(ids))[None]
    model(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=stored, use_cache=True)
    return [layer.keys[0] for layer in stored.layers]


def away_from_recomputed(model: PreTrainedModel, runner: Runner) -> float:
    """The largest difference of a shifted key from the one computed at its new position, over their root mean
    square."""
    ids = tiny.prompt(40)
    kv, entry = filled(runner, ids)
    window = entry.window
    assert window is not None
    kv.shift(entry)
    copies = keys_of(model, ids, 0)[0].shape[0] // entry.keys.shape[1]
    differences = []
    for layer, keys in enumerate(keys_of(model, ids, -window.n_discard)):
        expected = keys[::copies, window.n_keep + window.n_discard :]
        found = entry.read(layer, slice(window.n_keep, entry.held), torch.float32)[0]
        differences.append(float((found - expected).abs().max() / expected.square().mean().sqrt()))
    return max(differences)


@pytest.mark.parametrize("name", ROTARY)
def test_shifted_keys_are_those_computed_at_their_new_positions(name: str) -> None:
    assert away_from_recomputed(model_of(name), runner_of(name)) < 1e-4


@pytest.mark.parametrize("name", LEAN)
def test_the_lean_pass_shifts_as_exactly(name: str) -> None:
    model = built(LEAN[name])
    assert away_from_recomputed(model, lean(model)) < 1e-4


@pytest.mark.parametrize("name", TABLES)
def test_keys_turned_by_tables_are_those_computed_at_their_new_positions(name: str) -> None:
    runner, ids = runner_of(name), tiny.prompt(40)
    _, entry = filled(runner, ids)
    for layer, keys in enumerate(keys_of(model_of(name), ids, 18)):
        entry.keys[layer, :, 18:58] = keys
    shift = runner.key_shift()
    assert not isinstance(shift, str)
    shift.move(entry, 18, 58, 18)
    for layer, keys in enumerate(keys_of(model_of(name), ids, 0)):
        torch.testing.assert_close(entry.keys[layer, :, :40], keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LEAN)
def test_quantized_keys_are_within_half_a_step(name: str) -> None:
    runner = lean(built(LEAN[name]))
    kv, entry = filled(runner, tiny.prompt(40), quantized=True)
    exact = SlabKVCache(runner.kv_geometry(), 100, 100).reserve(tiny.prompt(40), 40)
    shift = runner.key_shift()
    assert exact is not None and not isinstance(shift, str)
    for layer in range(len(entry.keys)):
        exact.write(layer, 0, *entry.read(layer, slice(0, 40), torch.float32))
    shift.move(exact, 22, 40, 18)
    kv.shift(entry)
    for layer in range(len(entry.keys)):
        (found, _), (expected, _) = (each.read(layer, slice(4, 22), torch.float32) for each in (entry, exact))
        assert entry.scales is not None
        assert bool(((found - expected).abs() <= 0.501 * entry.scales[0][layer, :, 4:22, None]).all())


def test_many_shifts_leave_a_key_where_one_would() -> None:
    runner = tiny.ours(MODEL)
    ids = tiny.prompt(40)
    _, entry = filled(runner, ids)
    shift = runner.key_shift()
    assert not isinstance(shift, str)
    for first in range(36, 4, -1):
        shift.move(entry, first, first + 4, 1)
    expected = keys_of(MODEL, ids, -32)
    found = entry.keys[:, :, 4:8]
    assert max(float((found[n] - keys[:, 36:]).abs().max()) for n, keys in enumerate(expected)) < 1e-4


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ALIBI)
def test_alibi_moves_keys_as_they_are(name: str, quantized: bool) -> None:
    kv, entry = filled(runner_of(name), tiny.prompt(40), quantized=quantized)
    before = [each.clone() for each in entry.tensors]
    kv.shift(entry)
    for old, new in zip(before, entry.tensors, strict=True):
        assert torch.equal(new[:, :, 4:22], old[:, :, 22:40]) and torch.equal(new[:, :, :4], old[:, :, :4])


@pytest.mark.parametrize("quantized", [False, True])
def test_values_move_as_they_are(quantized: bool) -> None:
    kv, entry = filled(tiny.ours(MODEL), tiny.prompt(40), quantized=quantized)
    before = entry.values[:, :, 22:40].clone()
    kv.shift(entry)
    assert torch.equal(entry.values[:, :, 4:22], before)


@torch.inference_mode()
def by_hand(model: PreTrainedModel, tokens: tuple[int, ...], count: int, window: StreamingWindow) -> list[int]:
    """A greedy answer over Transformers' own cache, cut and turned with complex numbers."""
    text, done = list(tokens), 0
    stored = DynamicCache()
    turn = torch.polar(torch.ones(4), -window.n_discard * 10000.0 ** (-torch.arange(4) / 4))
    first, after = window.n_keep, window.n_keep + window.n_discard
    while len(text) < len(tokens) + count:
        held = stored.get_seq_length()
        if held == window.ctx_size:
            for layer in stored.layers:
                moved = torch.complex(*layer.keys[:, :, after:].chunk(2, dim=-1)) * turn
                turned = torch.cat((moved.real, moved.imag), dim=-1)
                layer.keys = torch.cat((layer.keys[:, :, :first], turned), dim=2)
                layer.values = torch.cat((layer.values[:, :, :first], layer.values[:, :, after:]), dim=2)
            held -= window.n_discard
        chunk = text[done : done + window.ctx_size - held]
        positions = torch.arange(held, held + len(chunk))[None]
        logits = model(torch.tensor([chunk]), position_ids=positions, past_key_values=stored, use_cache=True).logits
        done += len(chunk)
        if done == len(text):
            text.append(int(logits[0, -1].argmax()))
    return text[len(tokens) :]


@pytest.mark.parametrize("window", [WINDOW, StreamingWindow(20, 0, 3), StreamingWindow(33, 7, 20)])
def test_an_answer_is_that_of_transformers_over_a_cache_cut_by_hand(window: StreamingWindow) -> None:
    asked = {"ctx_size": window.ctx_size, "n_keep": window.n_keep, "n_discard": window.n_discard}
    found = tiny.run(
        tiny.engine_for(MODEL),
        *(tiny.request(ids, str(n), max_tokens=TOKENS, **asked) for n, ids in enumerate(PROMPTS)),
    )
    assert [found[str(n)] for n in range(4)] == [by_hand(MODEL, ids, TOKENS, window) for ids in PROMPTS]


def engine(draft: PreTrainedModel | None = None, **options: Any) -> Engine:
    proposer = LocalProposer(tiny.drafter_for(draft)) if draft is not None else None
    return tiny.engine_for(MODEL, proposer=proposer, **options)


def requests(**params: Any) -> list[tiny.Request]:
    return [tiny.request(ids, str(n), **{"max_tokens": TOKENS, **IN_WINDOW, **params}) for n, ids in enumerate(PROMPTS)]


def answers(engine: Engine, **params: Any) -> list[list[int]]:
    found = tiny.run(engine, *requests(**params))
    engine.check()
    return [found[str(n)] for n in range(len(PROMPTS))]


def metrics_of(engine: Engine, *requests: tiny.Request) -> list[Metrics]:
    for each in requests:
        engine.add(each)
    return [delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics]


SOURCES: dict[str, dict[str, Any]] = {
    "agreeing draft": {"draft": MODEL, "depth": 4},
    "disagreeing draft": {"draft": OTHER, "depth": 6},
    "lookup": {"lookup": 8, "depth": 8},
    "adaptive": {"draft": OTHER, "lookup": 8, "depth": "auto"},
    "small chunks": {"max_batched_tokens": 7},
    "large chunks": {"max_batched_tokens": 512},
    "preempted": {"capacity": 80, "draft": OTHER},
    "preempted, small chunks": {"capacity": 68, "max_batched_tokens": 11, "lookup": 8},
}


@cache
def alone(**params: Any) -> list[list[int]]:
    return [tiny.run(engine(), request)[request.request_id] for request in requests(**params)]


@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("how", SOURCES)
def test_nothing_around_a_sequence_changes_its_tokens(how: str, params: dict[str, Any]) -> None:
    assert answers(engine(**SOURCES[how]), **params) == alone(**params)


@pytest.mark.parametrize("discard", [1, 2, 27])
def test_nor_does_it_with_other_windows(discard: int) -> None:
    plain = answers(engine(), n_discard=discard)
    assert answers(engine(OTHER, lookup=8, depth=6), n_discard=discard) == plain


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_a_draft_of_the_same_weights_is_always_right(verification: str) -> None:
    """So it has shifted wherever the target has."""
    found = metrics_of(engine(MODEL, depth=4, verification=verification), *requests())
    assert all(each.accepted == each.drafted > 40 for each in found)


def test_a_draft_that_cannot_shift_drafts_nothing_and_harms_nothing() -> None:
    assert answers(engine(model_of("GPT-2"), depth=4)) == answers(engine())


def test_a_draft_with_a_shorter_context_drafts_until_it_ends() -> None:
    short = tiny.tiny_llama(max_position_embeddings=24)
    (metrics,) = metrics_of(engine(short, depth=4), requests()[0])
    assert 0 < metrics.drafted < 24


@pytest.mark.parametrize("name", [*ALIBI, "Falcon 7B", "GPT-J", "Cohere", "Gemma 3 (text)"])
def test_families_answer_alike_in_chunks_and_with_drafts(name: str) -> None:
    found = [
        tiny.run(tiny.engine_for(model_of(name), runner=runner_of(name), **options), *requests(max_tokens=40))
        for options in ({}, {"max_batched_tokens": 11, "lookup": 8, "depth": 6})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [*LEAN])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_lean_pass_answers_alike_in_chunks_and_with_drafts(name: str, quantized: bool) -> None:
    model = built(LEAN[name])
    runner = lean(model)
    each = requests(**SEEDED, max_tokens=40)
    found = [
        tiny.run(tiny.engine_for(model, runner=runner, quantized=quantized, **options), *each)
        for options in ({}, {"max_batched_tokens": 11, "lookup": 8, "depth": 6})
    ]
    assert found[0] == found[1]


# For ever.


def test_a_text_outgrows_the_model_and_the_cache() -> None:
    small = engine(OTHER, capacity=40, lookup=8)
    small.add(tiny.request(PROMPTS[0], max_tokens=700, **IN_WINDOW, **SEEDED))
    count = 0
    while small.has_work:
        count += sum(len(delta.token_ids) for delta in small.step().values())
        small.check()
        assert small.kv.usage().in_use <= 32
    assert count == 700 > MODEL.config.max_position_embeddings


def test_without_max_tokens_an_answer_ends_by_itself() -> None:
    tokens = tiny.run(engine(), tiny.request(PROMPTS[0], max_tokens=120, **IN_WINDOW))["r"]
    stop = tokens[100]
    request = tiny.request(PROMPTS[0], max_tokens=None, stop_token_ids=(stop,), **IN_WINDOW)
    assert tiny.run(engine(), request)["r"] == tokens[: tokens.index(stop) + 1]


def test_a_prompt_longer_than_the_model_s_context_is_taken() -> None:
    assert len(tiny.run(engine(), tiny.request(tiny.prompt(600), max_tokens=5, **IN_WINDOW))["r"]) == 5


def test_log_probabilities_of_a_long_prompt_do_not_depend_on_chunks_or_preemption() -> None:
    def told(**options: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        made = engine(**options)
        for request in requests(prompt_logprobs=0, max_tokens=20):
            made.add(request)
        for name, delta in tiny.deltas(made):
            found.setdefault(name, []).extend(each.logprob for each in delta.prompt_logprobs)
        return found

    whole, cut = told(), told(capacity=70, max_batched_tokens=5)
    assert [len(whole[str(n)]) for n in range(4)] == [len(ids) - 1 for ids in PROMPTS]
    assert all(cut[name] == pytest.approx(each, abs=1e-4) for name, each in whole.items())


# What is left behind, and who may go on from it.


LONG = tiny.prompt(115)
"""Ends more than a chunk of the index behind a shift of WINDOW."""


def turn(tokens: tuple[int, ...], session: str | None = "s", **params: Any) -> tiny.Request:
    return tiny.request(tokens, session=session, **{"max_tokens": 20, **IN_WINDOW, **params})


def test_a_second_turn_goes_on_from_a_shifted_window() -> None:
    made = engine()
    first = (*PROMPTS[3], *tiny.run(made, turn(PROMPTS[3]))["r"])
    second = (*first, *tiny.prompt(7, seed=5))
    (metrics,) = metrics_of(made, turn(second, "s"))
    assert metrics.cached_tokens == len(first) - 1
    made = engine()
    tiny.run(made, turn(PROMPTS[3]))
    assert tiny.run(made, turn(second)) == tiny.run(engine(), turn(second))


@pytest.mark.parametrize("other", [{"ctx_size": 40}, {"n_keep": 5}, {"n_discard": 3}, {"ctx_size": 0}])
def test_another_window_goes_on_from_the_sinks_alone(other: dict[str, Any]) -> None:
    made = engine()
    first = (*PROMPTS[3], *tiny.run(made, turn(PROMPTS[3]))["r"])
    params = {**IN_WINDOW, **other} if other.get("ctx_size") != 0 else {"n_keep": None, "n_discard": None, **other}
    (metrics,) = metrics_of(made, turn((*first, 5), "s", **params))
    assert metrics.cached_tokens == 4
    assert tiny.run(made, turn((*first, 7), "s", **params)) == tiny.run(engine(), turn((*first, 7), "s", **params))


def test_another_session_finds_a_shifted_window() -> None:
    made = engine()
    tiny.run(made, turn(LONG, max_tokens=2))
    (metrics,) = metrics_of(made, turn((*LONG, 5), "t"))
    assert metrics.cached_tokens == len(LONG)


def test_a_prefix_that_no_shift_has_touched_is_shared_by_all_windows() -> None:
    made = engine()
    tiny.run(made, turn(PROMPTS[1], None, max_tokens=2))
    wide = {"ctx_size": 60, "n_discard": 5}
    for params in ({}, wide, PLAIN):
        (metrics,) = metrics_of(made, turn((*PROMPTS[1], 5), None, max_tokens=1, **params))
        assert metrics.cached_tokens >= len(PROMPTS[1])


def test_a_window_takes_over_what_a_text_without_one_had_computed() -> None:
    made = engine()
    tiny.run(made, turn(PROMPTS[3], **PLAIN))
    (metrics,) = metrics_of(made, turn((*PROMPTS[3], 5)))
    assert metrics.cached_tokens == 32
    assert tiny.run(made, turn((*PROMPTS[3], 7))) == tiny.run(engine(), turn((*PROMPTS[3], 7)))


def test_a_text_that_parts_before_the_last_shift_starts_over() -> None:
    made = engine()
    tiny.run(made, turn(PROMPTS[3]))
    edited = (*PROMPTS[3][:60], *tiny.prompt(50, seed=8))
    (metrics,) = metrics_of(made, turn(edited))
    assert metrics.cached_tokens == 4
    assert tiny.run(engine(), turn(edited)) == tiny.run(made, turn(edited))


def test_a_shifted_session_moves_to_another_cache() -> None:
    here, there = engine(), engine()
    first = (*PROMPTS[3], *tiny.run(here, turn(PROMPTS[3]))["r"])
    export: KVExport = pickle.loads(pickle.dumps(here.kv.export_session("s")))
    assert there.kv.import_session(export)
    there.check()
    (metrics,) = metrics_of(there, turn((*first, 5)))
    assert metrics.cached_tokens == len(first) - 1


def test_an_evicted_window_is_built_again_as_it_was() -> None:
    made = engine()
    first = (*PROMPTS[3], *tiny.run(made, turn(PROMPTS[3]))["r"])
    made.kv.evict(made.kv.usage().total)
    assert tiny.run(made, turn((*first, 5))) == tiny.run(engine(), turn((*first, 5)))


def test_outputs_of_one_prompt_share_a_shifted_window() -> None:
    made = engine()
    request = tiny.request(LONG, n=3, max_tokens=20, **IN_WINDOW, **SEEDED)
    made.add_all(request.choices())
    found: dict[str, list[int]] = {}
    cached = []
    for name, delta in tiny.deltas(made):
        found.setdefault(name, []).extend(delta.token_ids)
        cached += [delta.metrics.cached_tokens] if delta.metrics else []
    assert sorted(cached) == [0, len(LONG) - 1, len(LONG) - 1]
    assert found["r"] == tiny.run(engine(), tiny.request(LONG, max_tokens=20, **IN_WINDOW, **SEEDED))["r"]


@settings(max_examples=30)
@given(
    turns=st.lists(
        st.tuples(
            st.integers(0, 3),  # prompt
            st.integers(0, 110),  # how much of the session's last turn is taken up
            st.sampled_from([{}, {"n_discard": 3}, {"ctx_size": 44}, PLAIN]),
            st.sampled_from(["s", "t", None]),
            st.integers(1, 40),
        ),
        min_size=2,
        max_size=6,
    ),
    capacity=st.integers(200, 600),
)
def test_whatever_is_cached_an_answer_is_that_of_an_empty_cache(
    turns: list[tuple[int, int, dict[str, Any], str | None, int]], capacity: int
) -> None:
    made = tiny.engine_for(SMALL, capacity=capacity, lookup=8)
    last: dict[str | None, tuple[int, ...]] = {}
    for which, taken, params, session, count in turns:
        tokens = (*last.get(session, ())[:taken], *PROMPTS[which])
        request = turn(tokens, session, **params, max_tokens=count)
        found = tiny.run(made, request)["r"]
        made.check()
        assert found == tiny.run(tiny.engine_for(SMALL), request)["r"]
        last[session] = (*tokens, *found)


# Refusals.


@pytest.mark.parametrize("name", POSITIONS)
def test_the_configuration_alone_tells_what_trying_finds(name: str) -> None:
    refusal = shift_refusal(model_of(name).config)
    found = runner_of(name).key_shift()
    assert (found if isinstance(found, str) else None) == refusal


@pytest.mark.parametrize("name", [*LEARNED, "Llama 4 (text)"])
def test_a_window_is_refused_where_positions_cannot_change(name: str) -> None:
    made = tiny.engine_for(model_of(name), runner=runner_of(name))
    with pytest.raises(InvalidRequest, match="ctx_size: no streaming window with this model") as refused:
        made.add(tiny.request((5, 6), **IN_WINDOW))
    assert refused.value.param == "ctx_size"


def test_an_embedding_that_depends_on_the_length_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = built(LlamaConfig(**SHAPE, rope_parameters=rope))
    found = tiny.ours(model).key_shift()
    assert found == "its dynamic rotary embedding depends on the length of the text"


def test_keys_that_turn_otherwise_are_refused() -> None:
    runner = tiny.ours(MODEL)
    rotary: Any = runner.model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, position_ids=position_ids**2)
    assert runner.key_shift() == "the keys of its layer 0 do not turn as those of a rotary embedding do"


def test_a_window_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ctx_size: 200 is beyond") as refused:
        engine(capacity=100).add(tiny.request((5, 6), ctx_size=200))
    assert refused.value.param == "ctx_size"
