"""Matchers and their masks, and what is refused as a grammar."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from paceline.errors import InvalidRequest
from paceline.speculation import grammar as module
from paceline.speculation.grammar import Grammars, check_grammar, tokenizer_text
from paceline.speculation.grammar_source import embedded
from paceline.speculation.sampling import Rows, adjust, draw
from paceline.types import MAX_GRAMMAR, Grammar, SamplingParams
from tests import schemas

VOCAB = 310
DIGITS = Grammar("regex", "[0-9]{2,}", ends=(2,))


def allowed(
    grammar: Grammar, output: tuple[int, ...] = (), grammars: Grammars | None = None, vocab: int = VOCAB
) -> set[int]:
    matcher = (grammars or schemas.grammars()).matcher(grammar, output)
    (row,) = (~matcher.refused((), 1, vocab)).tolist()
    return {token for token, free in enumerate(row) if free}


def texts(tokens: set[int]) -> set[str]:
    return {schemas.tokenizer().decode([token]) for token in tokens}


def test_a_mask_leaves_what_a_text_goes_on_with() -> None:
    assert texts(allowed(Grammar("regex", "yes|no"))) == {"y", "n", "no"}


def test_an_end_is_left_exactly_where_the_text_may_end() -> None:
    outputs = [schemas.ids(text) for text in ("1", "12", "123")]
    assert [2 in allowed(DIGITS, output) for output in outputs] == [False, True, True]


def test_every_end_is_left_and_no_other() -> None:
    grammar = Grammar("regex", "[0-9]{2,}", ends=(0, 7, 309))
    specials = allowed(grammar, schemas.ids("12")) - allowed(grammar, schemas.ids("1"))
    assert specials == {0, 7, 309}


def test_tokens_beyond_the_tokenizers_are_refused() -> None:
    assert max(allowed(Grammar("regex", "(.|\n)*"))) < schemas.tokenizer().get_vocab_size()


def test_special_tokens_are_no_text() -> None:
    assert allowed(Grammar("regex", "(.|\n)*")).isdisjoint({0, 1, 2})


def test_a_vocabulary_may_be_smaller_than_the_tokenizers() -> None:
    assert allowed(Grammar("regex", "(.|\n)*"), vocab=50) <= set(range(50))


@pytest.mark.parametrize("seed", range(8))
def test_a_matcher_that_followed_answers_as_one_made_anew(seed: int) -> None:
    """Candidates right and wrong, windows of every depth, and what is agreed comes in any pieces."""
    chance, grammar = Random(seed), schemas.json_schema(schemas.random_schema(seed))
    followed, output = schemas.grammars().matcher(grammar), []
    while not followed.complete and len(output) < 60:
        candidates = _run(chance, grammar, tuple(output))
        rows = followed.refused(candidates, len(candidates) + 1, VOCAB)
        legal = followed.admits(candidates)
        for place in range(legal + 1):
            anew = schemas.grammars().matcher(grammar, (*output, *candidates[:place]))
            assert torch.equal(rows[place], anew.refused((), 1, VOCAB)[0])
        agreed = [*candidates[: chance.randrange(legal + 1)]]
        for token in agreed:
            followed.push(token)
        output += agreed
        free = allowed(grammar, tuple(output))
        if free:
            output.append(chance.choice(sorted(free)))
            followed.push(output[-1])


def _run(chance: Random, grammar: Grammar, output: tuple[int, ...]) -> tuple[int, ...]:
    """Candidates that stay in the grammar, but for some."""
    run: list[int] = []
    for _ in range(chance.randrange(5)):
        free = sorted(allowed(grammar, (*output, *run)))
        run.append(chance.choice(free) if free and chance.random() < 0.8 else chance.randrange(VOCAB))
    return tuple(run)


def test_rows_behind_a_candidate_that_left_the_grammar_are_left_as_they_are() -> None:
    matcher = schemas.grammars().matcher(DIGITS)
    one, letter = schemas.ids("1")[0], schemas.ids("a")[0]
    refused = matcher.refused((one, letter, one), 4, VOCAB)
    assert refused.any(dim=1).tolist() == [True, True, False, False]
    assert bool(refused[1, letter])


def test_an_id_that_is_none_is_no_candidate() -> None:
    matcher = schemas.grammars().matcher(DIGITS)
    assert matcher.admits((10**6,)) == 0
    assert matcher.admits(schemas.ids("12")) == len(schemas.ids("12"))


def test_an_end_may_be_a_candidate_where_the_text_may_end() -> None:
    matcher = schemas.grammars().matcher(DIGITS)
    assert (matcher.admits((*schemas.ids("12"), 2)), matcher.admits((*schemas.ids("1"), 2))) == (
        len(schemas.ids("12")) + 1,
        1,
    )


def test_a_text_that_can_only_end_is_complete() -> None:
    matcher = schemas.grammars().matcher(Grammar("regex", "ab"), schemas.ids("ab"))
    assert (matcher.complete, matcher.failed) == (True, False)


def test_an_output_that_leaves_the_grammar_has_failed() -> None:
    assert schemas.grammars().matcher(Grammar("regex", "ab"), schemas.ids("ax")).failed


def test_json_has_at_most_one_space_in_a_place() -> None:
    grammar = schemas.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert not schemas.grammars().matcher(grammar, schemas.ids('{ "a" : 1 }')).failed
    for text in ('{  "a"', '{"a":  1', "{\n", " {"):
        assert schemas.grammars().matcher(grammar, schemas.ids(text)).failed


def test_a_schema_inside_a_lark_grammar_has_the_same_spaces() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = Grammar("lark", f'start: "<call>" call "</call>"\ncall: {embedded(schema)}')
    assert schemas.grammars().matcher(grammar, schemas.ids('<call>{"a": 1}</call>')).complete
    assert schemas.grammars().matcher(grammar, schemas.ids('<call>{"a":  1')).failed


def test_few_compiled_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COMPILED", 2)
    grammars = Grammars(schemas.tokenizer().to_str(), schemas.EOS)
    first, second, third = (Grammar("regex", "a" * n) for n in (1, 2, 3))
    for each in (first, second, first, third):
        grammars.compile(each)
    assert [grammars.knows(each) for each in (first, second, third)] == [True, False, True]


def test_ends_make_no_other_grammar() -> None:
    grammars = Grammars(schemas.tokenizer().to_str(), schemas.EOS)
    grammars.compile(Grammar("regex", "a"))
    assert grammars.knows(Grammar("regex", "a", ends=(2,)))


def test_pieces_of_sentencepiece_are_read() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "▁a", "b", "ab"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    found = allowed(Grammar("regex", " ?ab"), grammars=Grammars(backend.to_str(), {2}))
    assert found == {vocab[piece] for piece in ("▁", "a", "▁a", "ab", "<0x20>", "<0x61>")}


def test_a_tokenizer_without_bytes_takes_no_grammar() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InvalidRequest, match="tokenizer"):
        Grammars(words.to_str()).compile(DIGITS)


def test_a_tokenizer_in_python_has_no_text() -> None:
    assert tokenizer_text(object()) is None


def test_the_mask_comes_after_bias_and_penalties() -> None:
    params = SamplingParams(temperature=0, grammar=DIGITS, logit_bias={schemas.ids("a")[0]: 100.0, 7: -100.0})
    rows = Rows(params, 1, [5], matcher=schemas.grammars().matcher(DIGITS))
    logits = adjust(torch.zeros(1, VOCAB), rows)
    assert {n for n, x in enumerate(logits[0].tolist()) if x > -torch.inf} == allowed(DIGITS)


def test_a_row_without_any_token_left_is_drawn_all_the_same() -> None:
    params = SamplingParams(seed=1, top_p=0.9, top_k=5, grammar=DIGITS)
    rows = Rows(params, 1, [5], matcher=schemas.grammars().matcher(DIGITS))
    (found,) = draw(torch.full((1, VOCAB), -torch.inf), [rows])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "Unimplemented keys"),
        (Grammar("json_schema", '{"uniqueItems": true}'), "uniqueItems"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}'), "Unsatisfiable"),
        (Grammar("json_schema", '{"$ref": "https://example.com/schema.json"}'), "example.com"),
        (Grammar("json_schema", '{"$ref": "#"}'), "no text fits it"),
        (Grammar("json_schema", '{"type": "string"'), "EOF"),
        (Grammar("json_schema", "true"), "a schema is a JSON object"),
        (Grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), "recursion"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("lark", ""), "Empty grammar"),
        (Grammar("lark", "start: start"), "no text fits it"),
    ],
)
def test_what_is_no_grammar_is_refused_at_the_edge(grammar: Grammar, why: str) -> None:
    with pytest.raises(InvalidRequest, match=f"response_format: .*{why}") as refused:
        check_grammar(grammar)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 999983},
        {"type": "object", "patternProperties": {f"^{n}.*x{n}$": {"type": "integer"} for n in range(400)}},
        {"allOf": [{"anyOf": [{"properties": {f"a{n}{m}": {}}} for m in range(4)]} for n in range(12)]},
    ],
    ids=["one large number", "many patterns", "a product of choices"],
)
def test_what_takes_too_much_is_refused_at_the_edge(schema: schemas.Schema) -> None:
    with pytest.raises(InvalidRequest, match=r"tools: .*(too much time or memory|too large)"):
        check_grammar(Grammar("json_schema", json.dumps(schema)), param="tools")


def test_a_check_that_does_not_end_is_a_refusal() -> None:
    with pytest.raises(InvalidRequest, match="too much time"):
        check_grammar(Grammar("regex", "a slow machine"), timeout_s=0.001)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_a_grammar_passes(seed: int) -> None:
    check_grammar(schemas.json_schema(schemas.random_schema(seed)))


def test_a_grammar_is_short() -> None:
    with pytest.raises(InvalidRequest, match=f"at most {MAX_GRAMMAR}"):
        Grammar("regex", "a" * (MAX_GRAMMAR + 1))


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="json_schema, regex, lark"):
        Grammar("xml", "<a/>")  # type: ignore[arg-type]
