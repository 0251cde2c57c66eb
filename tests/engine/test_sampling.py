"""Penalties, bias, min_tokens, log probabilities and n in the engine, against plain decoding with Transformers.

The key fact for each: a draft, agreeing or not, changes no token; and one of the same weights is always
accepted, which holds only if both sides process logits identically.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from paceline.engine.engine import Engine
from paceline.engine.loop import EngineLoop
from paceline.errors import InvalidRequest, Overloaded
from paceline.seeds import choice_seed
from paceline.speculation import coupling
from paceline.speculation.local import LocalProposer
from paceline.types import Delta, FinishReason, Request, SamplingParams, TokenLogprobs
from tests import tiny

MODEL = tiny.tiny_llama()
OTHER = tiny.tiny_llama(seed=7)
PROMPTS = [tiny.prompt(n, seed=n) for n in (1, 5, 40)]
TOKENS = 24
EOS = 60
PATIENCE_S = 30.0
SEEDED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 11}
LIKELY = dict.fromkeys(tiny.generate(MODEL, PROMPTS[2])[:3], -8.0) | {17: 6.5}
FEATURES: dict[str, dict[str, object]] = {
    "repetition": {"repetition_penalty": 1.6},
    "repetition below 1": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.1},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.7},
    "bias": {"logit_bias": LIKELY},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (17, 30, *range(100, 140))},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": LIKELY,
        "min_tokens": 9,
        "stop_token_ids": (17, 30, *range(100, 140)),
    },
}
EACH = pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
MODES = pytest.mark.parametrize("mode", [{"temperature": 0.0}, SEEDED], ids=["greedy", "seeded"])


def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Of the next token: [1, vocab]."""
    return model(torch.tensor([tokens])).logits[:, -1].float()


def processed(logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], p: SamplingParams) -> torch.Tensor:
    """Transformers' own processors; OpenAI's formula for the two penalties Transformers does not have."""
    ids = torch.tensor([[*prompt, *output]])
    ends = sorted({EOS, *p.stop_token_ids})
    if p.min_tokens:
        logits = MinNewTokensLengthLogitsProcessor(len(prompt), p.min_tokens, ends)(ids, logits)
    if p.bias:
        logits = SequenceBiasLogitsProcessor({(token,): bias for token, bias in p.bias.items()})(ids, logits)
    logits = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, logits)
    for token in set(output):
        count = list(output).count(token)
        logits[0, token] -= p.frequency_penalty * count + p.presence_penalty
    return logits


def plain_decoding(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """One token at a time, everything recomputed: what the engine must say."""
    output: list[int] = []
    while len(output) < TOKENS:
        logits = processed(plain_logits(MODEL, [*prompt, *output]), prompt, output, params)
        output += coupling.draw(logits, params, [len(prompt) + len(output)])
        if output[-1] in (EOS, *params.stop_token_ids):
            break
    return output


def engine(drafting: PreTrainedModel | None = None, **options: object) -> Engine:
    proposer = None if drafting is None else LocalProposer(tiny.drafter_for(drafting))
    return tiny.engine_for(MODEL, proposer=proposer, eos=frozenset({EOS}), **options)  # type: ignore[arg-type]


def requests(**params: object) -> list[Request]:
    return [tiny.request(tokens, str(n), **{"max_tokens": TOKENS, **params}) for n, tokens in enumerate(PROMPTS)]


def outputs(engine: Engine, *wanted: Request) -> dict[str, list[int]]:
    return tiny.run(engine, *wanted)


def collect(engine: Engine, *wanted: Request) -> dict[str, list[Delta]]:
    for each in wanted:
        engine.add_all(each.choices())
    found: dict[str, list[Delta]] = {}
    for name, delta in tiny.deltas(engine):
        found.setdefault(name, []).append(delta)
    return found


# Processing.


@EACH
@MODES
def test_the_engine_says_what_plain_decoding_with_transformers_processors_says(
    feature: dict[str, object], mode: dict[str, object]
) -> None:
    wanted = requests(**mode, **feature)
    expected = {each.request_id: plain_decoding(each.token_ids, each.params) for each in wanted}
    assert outputs(engine(), *wanted) == expected


@EACH
def test_each_feature_changes_the_output(feature: dict[str, object]) -> None:
    without = {"stop_token_ids": feature["stop_token_ids"]} if "stop_token_ids" in feature else {}
    assert outputs(engine(), *requests(**SEEDED, **feature)) != outputs(engine(), *requests(**SEEDED, **without))


@EACH
@MODES
@pytest.mark.parametrize("drafting", [MODEL, OTHER], ids=["agreeing", "disagreeing"])
def test_a_draft_changes_no_token(
    feature: dict[str, object], mode: dict[str, object], drafting: PreTrainedModel
) -> None:
    wanted = requests(**mode, **feature)
    assert outputs(engine(drafting), *wanted) == outputs(engine(), *wanted)


@EACH
@MODES
def test_a_draft_of_the_same_weights_is_always_accepted(feature: dict[str, object], mode: dict[str, object]) -> None:
    found = collect(engine(MODEL), *requests(**mode, **feature, ignore_eos=True))
    for *_, end in found.values():
        assert end.metrics is not None and end.metrics.accepted > 0
        # Candidates behind a stop are rolled back too, at most those of one run.
        assert end.metrics.rolled_back <= (3 if end.finish_reason is FinishReason.STOP else 0)


@EACH
def test_preemption_and_chunks_change_nothing(feature: dict[str, object]) -> None:
    wanted = requests(**SEEDED, **feature)
    assert outputs(engine(capacity=110, max_batched_tokens=7), *wanted) == outputs(engine(), *wanted)


def test_a_batch_of_plain_and_processed_requests_gives_each_its_own() -> None:
    kinds = [{"temperature": 0.0}, SEEDED, {"temperature": 0.0, **FEATURES["all"]}, {**SEEDED, **FEATURES["all"]}]
    wanted = [tiny.request(PROMPTS[2], str(n), max_tokens=TOKENS, **kind) for n, kind in enumerate(kinds)]
    alone = {each.request_id: outputs(engine(), each)[each.request_id] for each in wanted}
    assert outputs(engine(), *wanted) == alone


def test_stop_ids_end_the_output_once_there_are_min_tokens() -> None:
    every = tuple(range(0, tiny.VOCAB, 2))
    found = outputs(engine(), *requests(**SEEDED, min_tokens=5, stop_token_ids=every))
    for tokens in found.values():
        assert all(token % 2 for token in tokens[:5])
        assert [token % 2 for token in tokens[5:]].count(0) == 1


def test_a_bias_of_an_unknown_token_names_the_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine().add(tiny.request(PROMPTS[1], logit_bias={tiny.VOCAB: 1.0}))
    assert caught.value.param == "logit_bias"


def test_a_draft_with_a_smaller_vocabulary_still_drafts() -> None:
    small = tiny.tiny_llama(vocab_size=150)
    low = tuple(token % 100 for token in PROMPTS[2])
    params = {"max_tokens": TOKENS, "logit_bias": dict.fromkeys(range(100, 199), -100.0), "repetition_penalty": 1.2}
    drafted = engine(small)
    assert outputs(drafted, tiny.request(low, **params)) == outputs(engine(), tiny.request(low, **params))
    assert drafted.tally.drafted > 0


# Log probabilities.


def expected_logprobs(tokens: Sequence[int], start: int, top: int) -> list[TokenLogprobs]:
    """Of tokens[start:], from one forward pass of Transformers over all of them."""
    rows = MODEL(torch.tensor([tokens])).logits[0, start - 1 : -1].float().log_softmax(-1)
    found = []
    for row, token in zip(rows, tokens[start:], strict=True):
        order = row.argsort(descending=True).tolist()
        best = tuple((candidate, row[candidate].item()) for candidate in order[:top])
        found.append(TokenLogprobs(token, row[token].item(), order.index(token) + 1, best))
    return found


def assert_close(found: Sequence[TokenLogprobs], expected: Sequence[TokenLogprobs]) -> None:
    assert [(e.token_id, e.rank, [t for t, _ in e.top]) for e in found] == [
        (e.token_id, e.rank, [t for t, _ in e.top]) for e in expected
    ]
    flat = [[v for e in entries for v in (e.logprob, *(x for _, x in e.top))] for entries in (found, expected)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-4)


@pytest.mark.parametrize("drafting", [None, MODEL, OTHER], ids=["plain", "agreeing", "disagreeing"])
@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_those_of_the_unprocessed_model(drafting: PreTrainedModel | None, top: int) -> None:
    wanted = requests(**SEEDED, **FEATURES["all"], logprobs=top)
    for name, deltas in collect(engine(drafting), *wanted).items():
        prompt = PROMPTS[int(name)]
        tokens = [token for delta in deltas for token in delta.token_ids]
        entries = [entry for delta in deltas for entry in delta.logprobs]
        assert_close(entries, expected_logprobs([*prompt, *tokens], len(prompt), top))


def test_every_delta_has_the_logprobs_of_its_own_tokens() -> None:
    (deltas,) = collect(engine(MODEL), tiny.request(PROMPTS[2], logprobs=1)).values()
    assert [[e.token_id for e in delta.logprobs] for delta in deltas] == [list(delta.token_ids) for delta in deltas]


def test_without_logprobs_there_are_none() -> None:
    (deltas,) = collect(engine(), tiny.request(PROMPTS[2])).values()
    assert all(delta.logprobs == delta.prompt_logprobs == () for delta in deltas)


@pytest.mark.parametrize("budget", [64, 7])
def test_prompt_logprobs_come_with_the_first_tokens(budget: int) -> None:
    wanted = requests(prompt_logprobs=2)
    for name, deltas in collect(engine(MODEL, max_batched_tokens=budget), *wanted).items():
        prompt = PROMPTS[int(name)]
        assert_close(deltas[0].prompt_logprobs, expected_logprobs(prompt, 1, 2) if len(prompt) > 1 else [])
        assert not any(delta.prompt_logprobs for delta in deltas[1:])


def test_prompt_logprobs_are_complete_though_the_prompt_is_cached() -> None:
    warm = engine()
    outputs(warm, tiny.request(PROMPTS[2], "a", "s"))
    (deltas,) = collect(warm, tiny.request(PROMPTS[2], "b", "s", prompt_logprobs=0)).values()
    assert len(deltas[0].prompt_logprobs) == len(PROMPTS[2]) - 1
    assert deltas[-1].metrics is not None
    assert deltas[-1].metrics.cached_tokens == 0


def test_prompt_logprobs_change_no_token() -> None:
    told = requests(**SEEDED, prompt_logprobs=1)
    assert outputs(engine(OTHER), *told) == outputs(engine(), *requests(**SEEDED))


def test_preemption_tells_no_prompt_token_twice() -> None:
    wanted = [tiny.request(PROMPTS[2], str(n), max_tokens=60, prompt_logprobs=0) for n in range(4)]
    for deltas in collect(engine(capacity=160, max_batched_tokens=16), *wanted).values():
        told = [entry.token_id for delta in deltas for entry in delta.prompt_logprobs]
        assert told == list(PROMPTS[2][1:])


# n.


def test_output_zero_is_the_output_of_n_1_and_the_others_of_their_own_seeds() -> None:
    found = collect(engine(), tiny.request(PROMPTS[2], **SEEDED, n=3))
    tokens = [[token for delta in deltas for token in delta.token_ids] for deltas in found.values()]
    seeds = [choice_seed(11, index) for index in range(3)]
    alone = [outputs(engine(), tiny.request(PROMPTS[2], **SEEDED | {"seed": seed}))["r"] for seed in seeds]
    assert seeds[0] == 11
    assert tokens == alone
    assert len({tuple(each) for each in tokens}) == 3


def test_choice_seeds_are_pinned() -> None:
    assert [choice_seed(11, index) for index in range(3)] == [11, 722521317805139933, 9488887583743715985]


@pytest.mark.parametrize("drafting", [MODEL, OTHER], ids=["agreeing", "disagreeing"])
def test_a_draft_changes_no_token_of_n_outputs(drafting: PreTrainedModel) -> None:
    wanted = tiny.request(PROMPTS[2], **SEEDED, **FEATURES["repetition"], n=4)
    found, plain = (collect(which, wanted) for which in (engine(drafting), engine()))
    tokens = [[[t for d in deltas for t in d.token_ids] for deltas in each.values()] for each in (found, plain)]
    assert tokens[0] == tokens[1]


def test_the_prompt_of_n_outputs_is_computed_once() -> None:
    found = collect(engine(), tiny.request(PROMPTS[2], session="s", **SEEDED, n=4))
    metrics = [deltas[-1].metrics for deltas in found.values()]
    assert [m.cached_tokens for m in metrics if m is not None] == [0] + [len(PROMPTS[2]) - 1] * 3


def test_deltas_say_which_output_they_are_of() -> None:
    found = collect(engine(), tiny.request(PROMPTS[2], n=3, seed=1))
    assert {name: {delta.index for delta in deltas} for name, deltas in found.items()} == {
        "r": {0},
        "r/1": {1},
        "r/2": {2},
    }


def test_only_the_first_output_belongs_to_the_session_and_tells_of_the_prompt() -> None:
    made = engine()
    found = collect(made, tiny.request(PROMPTS[2], session="s", n=3, seed=1, prompt_logprobs=0))
    assert set(made.kv.sessions()) == {"s"}
    assert [sum(len(d.prompt_logprobs) for d in deltas) for deltas in found.values()] == [len(PROMPTS[2]) - 1, 0, 0]


def test_more_outputs_than_sequences_are_refused_and_a_full_queue_takes_none() -> None:
    made = engine(max_num_seqs=4, max_queued_requests=4)
    with pytest.raises(InvalidRequest) as caught:
        made.add_all(tiny.request(PROMPTS[1], n=5, seed=1).choices())
    assert (caught.value.param, made.has_work) == ("n", False)
    made.add_all(tiny.request(PROMPTS[1], "a", n=2, seed=1).choices())
    with pytest.raises(Overloaded):
        made.add_all(tiny.request(PROMPTS[1], "b", n=3, seed=1).choices())
    assert made.num_waiting == 2


def test_outputs_go_on_when_the_first_is_aborted_before_its_prompt() -> None:
    made = engine(max_batched_tokens=4)
    made.add_all(tiny.request(PROMPTS[2], **SEEDED, n=2).choices())
    made.step()
    ended = made.abort("r")
    assert ended is not None
    assert ended.finish_reason is FinishReason.ABORT
    alone = outputs(engine(), tiny.request(PROMPTS[2], **SEEDED | {"seed": choice_seed(11, 1)}))["r"]
    assert tiny.finish(made) == {"r/1": alone}


# The thread around the engine.


def test_the_loop_hands_out_all_outputs_of_one_request() -> None:
    loop = EngineLoop(engine(MODEL))
    ended: queue.Queue[Delta] = queue.Queue()
    loop.submit(tiny.request(PROMPTS[2], **SEEDED, n=3), lambda frame: frame.finished and ended.put(frame)).result()  # type: ignore[union-attr]
    found = sorted(ended.get(timeout=PATIENCE_S).index for _ in range(3))
    loop.stop()
    assert found == [0, 1, 2]


def test_aborting_a_request_ends_all_its_outputs() -> None:
    made = engine(max_batched_tokens=2)
    loop = EngineLoop(made)
    loop.submit(tiny.request(PROMPTS[2], **SEEDED, n=3, max_tokens=400), [].append).result()
    loop.abort("r", 3).result()
    left = loop.call(lambda: (made.has_work, made.kv.usage().in_use)).result()
    loop.stop()
    assert left == (False, 0)
