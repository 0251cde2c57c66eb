"""The engine against transformers.generate and against itself: batching, chunking, caching change nothing."""

from __future__ import annotations

import pytest

from paceline.errors import InvalidRequest, Overloaded
from paceline.speculation.local import LocalProposer
from paceline.types import FinishReason
from tests import tiny

MODEL = tiny.tiny_llama()
OTHER = tiny.tiny_llama(seed=7)
PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 2, 5, 17, 40, 100)]
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    return [tiny.generate(MODEL, tokens) for tokens in PROMPTS]


def names(outputs: dict[str, list[int]]) -> list[list[int]]:
    return [outputs[str(n)] for n in range(len(PROMPTS))]


def requests(**params: object) -> list[tiny.Request]:
    return [tiny.request(tokens, str(n), **params) for n, tokens in enumerate(PROMPTS)]


def test_greedy_equals_transformers_one_at_a_time(reference: list[list[int]]) -> None:
    found = [tiny.run(tiny.engine_for(MODEL), each)[each.request_id] for each in requests()]
    assert found == reference


def test_greedy_equals_transformers_in_one_ragged_batch(reference: list[list[int]]) -> None:
    assert names(tiny.run(tiny.engine_for(MODEL), *requests())) == reference


@pytest.mark.parametrize("budget", [3, 7, 33])
def test_chunked_prefill_changes_nothing(reference: list[list[int]], budget: int) -> None:
    assert names(tiny.run(tiny.engine_for(MODEL, max_batched_tokens=budget), *requests())) == reference


@pytest.mark.parametrize("drafting", [MODEL, OTHER], ids=["agreeing", "disagreeing"])
@pytest.mark.parametrize("depth", [1, 4, 9])
def test_speculation_changes_no_greedy_token(reference: list[list[int]], drafting: object, depth: int) -> None:
    proposer = LocalProposer(tiny.drafter_for(drafting))
    assert names(tiny.run(tiny.engine_for(MODEL, proposer=proposer, depth=depth), *requests())) == reference


@pytest.mark.parametrize("drafting", [MODEL, OTHER], ids=["agreeing", "disagreeing"])
def test_speculation_changes_no_sampled_token(drafting: object) -> None:
    plain = tiny.run(tiny.engine_for(MODEL), *requests(**SEEDED))
    proposer = LocalProposer(tiny.drafter_for(drafting))
    assert tiny.run(tiny.engine_for(MODEL, proposer=proposer), *requests(**SEEDED)) == plain


def test_batching_changes_no_sampled_token() -> None:
    alone = {each.request_id: tiny.run(tiny.engine_for(MODEL), each)[each.request_id] for each in requests(**SEEDED)}
    assert tiny.run(tiny.engine_for(MODEL), *requests(**SEEDED)) == alone


def test_the_seed_decides() -> None:
    first, second = (tiny.run(tiny.engine_for(MODEL), *requests(**SEEDED | {"seed": s})) for s in (1, 2))
    assert first != second


def test_a_draft_of_the_same_weights_is_always_accepted() -> None:
    engine = tiny.engine_for(MODEL, proposer=LocalProposer(tiny.drafter_for(MODEL)))
    for each in requests(**SEEDED):
        engine.add(each)
    metrics = [delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics]
    assert all(m.drafted == m.accepted > 0 and m.late == 0 for m in metrics)


def test_an_accepted_run_saves_steps() -> None:
    engine = tiny.engine_for(MODEL, proposer=LocalProposer(tiny.drafter_for(MODEL)), depth=4)
    engine.add(tiny.request(PROMPTS[2], max_tokens=21))
    (metrics,) = [delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics]
    assert metrics.steps == 4  # the prompt gives one token, then four runs of five


def test_candidates_outside_the_vocabulary_are_dropped(reference: list[list[int]]) -> None:
    proposer = LocalProposer(tiny.drafter_for(tiny.tiny_llama(vocab_size=400)))
    engine = tiny.engine_for(MODEL, proposer=proposer)
    assert names(tiny.run(engine, *requests())) == reference
    assert engine.tally.drafted > 0


def test_eos_inside_an_accepted_run_ends_there() -> None:
    plain = tiny.generate(MODEL, PROMPTS[3])
    eos = frozenset({plain[2]})
    proposer = LocalProposer(tiny.drafter_for(MODEL))
    engine = tiny.engine_for(MODEL, proposer=proposer, depth=8, eos=eos)
    assert tiny.run(engine, tiny.request(PROMPTS[3]))["r"] == plain[: plain.index(plain[2]) + 1]


def test_ignore_eos_goes_on(reference: list[list[int]]) -> None:
    engine = tiny.engine_for(MODEL, eos=frozenset(reference[3]))
    assert tiny.run(engine, tiny.request(PROMPTS[3], ignore_eos=True))["r"] == reference[3]


def test_the_context_limit_ends_with_length() -> None:
    engine = tiny.engine_for(MODEL, proposer=LocalProposer(tiny.drafter_for(MODEL)))
    engine.add(tiny.request(tiny.prompt(500), max_tokens=None))
    found = [delta for _, delta in tiny.deltas(engine)]
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(delta.token_ids) for delta in found) == 12


def test_a_second_turn_computes_only_its_new_tokens() -> None:
    engine = tiny.engine_for(MODEL)
    first = PROMPTS[5]
    answer = tuple(tiny.run(engine, tiny.request(first, "a", "s"))["a"])
    second = (*first, *answer, *tiny.prompt(9, seed=3))
    engine.add(tiny.request(second, "b", "s"))
    metrics = next(delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics)
    # The last token of an answer is never fed back, so its keys and values are not there.
    assert metrics.cached_tokens == len(first) + len(answer) - 1


def test_a_second_turn_equals_a_fresh_start() -> None:
    engine = tiny.engine_for(MODEL)
    answer = tuple(tiny.run(engine, tiny.request(PROMPTS[4], "a", "s"))["a"])
    second = (*PROMPTS[4], *answer, *tiny.prompt(9, seed=3))
    assert tiny.run(engine, tiny.request(second, "b", "s"))["b"] == tiny.generate(MODEL, second)


def test_an_edited_history_reuses_only_what_agrees() -> None:
    engine = tiny.engine_for(MODEL)
    tiny.run(engine, tiny.request(PROMPTS[5], "a", "s"))
    edited = (*PROMPTS[5][:50], *tiny.prompt(30, seed=8))
    assert tiny.run(engine, tiny.request(edited, "b", "s"))["b"] == tiny.generate(MODEL, edited)


def test_another_session_copies_a_shared_prefix_and_leaves_it_intact() -> None:
    engine = tiny.engine_for(MODEL)
    tiny.run(engine, tiny.request(PROMPTS[5], "a", "s"))
    other = (*PROMPTS[5][:64], *tiny.prompt(10, seed=4))
    engine.add(tiny.request(other, "b", "t"))
    metrics = next(delta.metrics for _, delta in tiny.deltas(engine) if delta.metrics)
    assert (metrics.cached_tokens, set(engine.kv.sessions())) == (64, {"s", "t"})


def test_preemption_changes_no_token(reference: list[list[int]]) -> None:
    engine = tiny.engine_for(MODEL, capacity=160)
    many = [tiny.request(PROMPTS[3], str(n), max_tokens=100) for n in range(4)]
    assert list(tiny.run(engine, *many).values()) == [tiny.generate(MODEL, PROMPTS[3], 100)] * 4


def test_room_is_given_in_stretches() -> None:
    engine = tiny.engine_for(MODEL)
    engine.add(tiny.request(PROMPTS[2], max_tokens=200))
    rooms = set()
    while engine.has_work:
        engine.step()
        rooms.add(engine.kv.usage().in_use)
    assert len(rooms) <= 200 // 32 + 2


def test_abort_frees_everything() -> None:
    engine = tiny.engine_for(MODEL, proposer=LocalProposer(tiny.drafter_for(MODEL)))
    engine.add(tiny.request(PROMPTS[3]))
    engine.step()
    engine.step()
    delta = engine.abort("r")
    assert delta is not None
    assert (delta.finish_reason, engine.has_work, engine.kv.usage().in_use) == (FinishReason.ABORT, False, 0)


def test_a_prompt_beyond_the_context_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match="512") as caught:
        tiny.engine_for(MODEL).add(tiny.request(tiny.prompt(512)))
    assert caught.value.param == "prompt"


def test_too_many_tokens_asked_for_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match="at most 412 fit") as caught:
        tiny.engine_for(MODEL).add(tiny.request(tiny.prompt(100), max_tokens=413))
    assert caught.value.param == "max_tokens"


def test_a_full_queue_refuses() -> None:
    engine = tiny.engine_for(MODEL, max_queued_requests=1)
    engine.add(tiny.request(PROMPTS[1], "a"))
    with pytest.raises(Overloaded) as caught:
        engine.add(tiny.request(PROMPTS[1], "b"))
    assert caught.value.retry_after
