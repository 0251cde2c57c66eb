"""`from paceline import LLM, SamplingParams`: the engine in this process, on the real small model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import paceline
from paceline import LLM, SamplingParams
from paceline.errors import ConfigError, InvalidRequest, ModelError
from paceline.models import ModelFiles
from paceline.types import Grammar

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=24)


@pytest.fixture(scope="module")
def llm(smollm2: ModelFiles) -> LLM:
    return LLM("smollm2-135m", max_num_seqs=8, kv_tokens=8192)


@pytest.fixture(scope="module")
def drafted(smollm2: ModelFiles) -> LLM:
    return LLM(str(smollm2.path), draft="smollm2-135m", depth=3, kv_tokens=8192)


def test_public_names() -> None:
    names = {"LLM", "FinishReason", "Metrics", "PacelineError", "RequestOutput", "SamplingParams", "__version__"}
    assert set(paceline.__all__) == names


def test_a_string_and_its_token_ids_give_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The capital of France is")
    text, tokens = llm.generate(["The capital of France is", ids], GREEDY)
    assert (text.token_ids, text.text) == (tokens.token_ids, tokens.text)
    assert text.text.startswith(" Paris")


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    assert len(llm.generate("Hello", GREEDY)) == 1
    assert len(llm.generate([1, 2, 3], GREEDY)) == 1


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    assert [len(o.token_ids) for o in llm.generate(["a", "b", "c"], params)] == [9, 1, 5]


def test_the_seed_drawn_is_reported_and_repeats_the_output(llm: LLM) -> None:
    first = llm.generate("Once upon a time", SamplingParams(max_tokens=16))[0]
    again = llm.generate("Once upon a time", SamplingParams(max_tokens=16, seed=first.seed))[0]
    assert again.token_ids == first.token_ids


def test_a_draft_in_this_process_changes_no_token(llm: LLM, drafted: LLM) -> None:
    prompts = ["Once upon a time", "The three laws of motion are"]
    plain = [o.token_ids for o in llm.generate(prompts, SEEDED)]
    outputs = drafted.generate(prompts, SEEDED)
    assert [o.token_ids for o in outputs] == plain
    assert all(o.metrics.drafted > 0 for o in outputs)


def test_chat_uses_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    plain = llm.generate("The capital of France is", GREEDY)[0].text
    stopped = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12, stop=("is",)))[0]
    assert stopped.finish_reason == ("stop" if "is" in plain else "length")
    assert stopped.text == plain.partition("is")[0]


def test_n_outputs_share_one_prompt(llm: LLM) -> None:
    prompt = "Once upon a time, in a land far away behind seven mountains, there lived a"
    (found,) = llm.generate(prompt, SamplingParams(max_tokens=8, seed=5, n=3))
    (alone,) = llm.generate(prompt, SamplingParams(max_tokens=8, seed=5))
    assert [output.index for output in found.outputs] == [0, 1, 2]
    assert (found.token_ids, found.text, found.seed) == (alone.token_ids, alone.text, 5)
    assert len({output.text for output in found.outputs}) == 3
    assert [output.metrics.cached_tokens for output in found.outputs[1:]] == [len(found.prompt_token_ids) - 1] * 2


def test_an_output_repeats_from_its_own_seed(llm: LLM) -> None:
    (found,) = llm.generate("Once upon a time", SamplingParams(max_tokens=8, n=2))
    (again,) = llm.generate("Once upon a time", SamplingParams(max_tokens=8, seed=found.outputs[1].seed))
    assert again.token_ids == found.outputs[1].token_ids


def test_logprobs_have_an_entry_for_each_token(llm: LLM) -> None:
    (found,) = llm.generate("The capital of France is", replace(GREEDY, logprobs=2, prompt_logprobs=0))
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    assert tuple(entry.token_id for entry in found.logprobs) == found.token_ids
    assert all(entry.rank == 1 and entry.top[0] == (entry.token_id, entry.logprob) for entry in found.logprobs)
    told = [entry.token_id if entry is not None else None for entry in found.prompt_logprobs]
    assert told == [None, *found.prompt_token_ids[1:]]


def test_without_logprobs_there_are_none(llm: LLM) -> None:
    (found,) = llm.generate("Hello", GREEDY)
    assert (found.logprobs, found.prompt_logprobs) == (None, None)


def test_a_draft_in_this_process_changes_no_penalized_token(llm: LLM, drafted: LLM) -> None:
    params = replace(
        SEEDED, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, min_tokens=9, n=2, max_tokens=12
    )
    plain = llm.generate("The three laws of motion are", params)[0]
    found = drafted.generate("The three laws of motion are", params)[0]
    assert [o.token_ids for o in found.outputs] == [o.token_ids for o in plain.outputs]
    assert all(o.metrics.drafted > 0 for o in found.outputs)


def test_a_stop_string_may_stay_in_the_text(llm: LLM) -> None:
    (found,) = llm.generate("The capital of France is", replace(GREEDY, stop="Par", include_stop_str_in_output=True))
    assert found.text == " Par"


def test_a_bad_prompt_is_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts\.1"):
        llm.generate(["fine", [1, "x"]], GREEDY)  # type: ignore[list-item]


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(["fine", list(range(3, 9000))], GREEDY)
    assert not llm.engine.has_work


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="thread: unknown key"):
        LLM("smollm2-135m", thread=1)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        LLM("no-such-model")


CITY = Grammar(
    "json_schema",
    '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],'
    ' "additionalProperties": false}',
)


def test_a_grammar_binds_the_text(llm: LLM) -> None:
    (found,) = llm.generate("Where is the Louvre? As JSON: ", replace(SEEDED, grammar=CITY, max_tokens=60))
    assert (list(json.loads(found.text)), found.finish_reason) == (["city"], "stop")


def test_a_draft_in_this_process_keeps_to_the_grammar(llm: LLM, drafted: LLM) -> None:
    params = replace(SEEDED, grammar=CITY, max_tokens=60)
    (plain,) = llm.generate("Where is the Louvre? As JSON: ", params)
    (found,) = drafted.generate("Where is the Louvre? As JSON: ", params)
    assert found.token_ids == plain.token_ids
    assert found.metrics.accepted > 0
