"""Random JSON Schemas whose texts are short, and a tokenizer of bytes for models that are to write them."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from paceline.speculation.grammar import Grammars
from paceline.types import Grammar

EOS = frozenset({2})
CORPUS = [json.dumps({"name": "value", "items": [1, 2, 30], "is": True, "not": False, "none": None})] * 40
NAMES = ("a", "name", "x y", "größe", 'quo"te', "list")
WORDS = ("red", "green", "", "blue sky", "naïve", 'a"b', "line\nbreak")

Schema = dict[str, Any]


@cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE: every byte, some merges, three special tokens, of which 2 ends a text."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True) for name in ("<pad>", "<bos>", "<eos>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return found


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer().to_str(), EOS)


class Text:
    """The tokenizer as a `Decoder`."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text).ids)


def random_schema(seed: int) -> Schema:
    """Every keyword comes up within a few dozen seeds."""
    chance = Random(seed)
    whole = _object(chance, 2) if chance.random() < 0.5 else _schema(chance, 2)
    if chance.random() < 0.2:
        return {"$defs": {"it": whole}, "type": "array", "items": {"$ref": "#/$defs/it"}, "minItems": 1, "maxItems": 2}
    return whole


def json_schema(schema: Schema) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def _schema(chance: Random, depth: int) -> Schema:
    plain = [_string, _integer, _number, _enum, _const, _boolean, _null, _nullable]
    nested = [_object, _array, _tuple, _any_of, _one_of, _all_of]
    return chance.choice(plain + nested * 2 if depth else plain)(chance, depth - 1)


def _string(chance: Random, depth: int) -> Schema:
    least = chance.randrange(3)
    sized = {"type": "string", "minLength": least, "maxLength": least + chance.randrange(6)}
    others = {"type": "string", "pattern": "^[a-c]{1,4}(-[0-9]{2})?$"}, {"type": "string", "format": "date"}
    return chance.choice((sized, sized, *others))


def _integer(chance: Random, depth: int) -> Schema:
    low = chance.randrange(-50, 50)
    return chance.choice(
        (
            {"type": "integer", "minimum": low, "maximum": low + chance.randrange(200)},
            {"type": "integer", "multipleOf": chance.choice((2, 5, 7)), "minimum": 0, "maximum": 1000},
        )
    )


def _number(chance: Random, depth: int) -> Schema:
    low = chance.randrange(-5, 5) / 2
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + 0.5 + chance.randrange(9)}


def _enum(chance: Random, depth: int) -> Schema:
    return {"enum": chance.sample([*WORDS, 3, -1.5, None, [1, "x"], {"k": 0}], chance.randrange(1, 5))}


def _const(chance: Random, depth: int) -> Schema:
    return {"const": chance.choice([*WORDS, 12, False, {"a": [True, None]}])}


def _boolean(chance: Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _null(chance: Random, depth: int) -> Schema:
    return {"type": "null", "description": "nothing"}


def _nullable(chance: Random, depth: int) -> Schema:
    return {"type": ["string", "null"], "maxLength": 4}


def _object(chance: Random, depth: int) -> Schema:
    names = chance.sample(NAMES, chance.randrange(4))
    properties = {name: _schema(chance, max(0, depth)) for name in names}
    required = [name for name in names if chance.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: Random, depth: int) -> Schema:
    least = chance.randrange(2)
    sizes = {"minItems": least, "maxItems": least + chance.randrange(3)}
    return {"type": "array", "items": _schema(chance, max(0, depth)), **sizes}


def _tuple(chance: Random, depth: int) -> Schema:
    first = [_schema(chance, 0) for _ in range(chance.randrange(1, 3))]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}


def _any_of(chance: Random, depth: int) -> Schema:
    return {"anyOf": [_schema(chance, max(0, depth)) for _ in range(2)]}


def _one_of(chance: Random, depth: int) -> Schema:
    return {"oneOf": [_string(chance, 0), {"type": "null"}]}


def _all_of(chance: Random, depth: int) -> Schema:
    return {"allOf": [{"type": "string", "minLength": 1}, {"type": "string", "maxLength": 5}]}
