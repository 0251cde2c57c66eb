"""Requests nobody would send: messages of any service filled at random from their descriptors, and broken bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message

TEXTS = (
    "",
    "hi",
    "user",
    "assistant",
    "system",
    "tool",
    "s/1",
    "s2",
    "target-1",
    "FORBIDDEN",
    "\x00",
    "a\nb",
    "\u202e\ufeff\U0001f6b4",
    "\ue000answer\ue001",
    '{"type": "object"}',
    "{" * 5000,
    "(" * 2000,
    "é" * 3000,
    "word " * 20_000,
)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"))
COUNTS = (0, 1, 1, 1, 2, 3, 40)
TAME: dict[str, tuple[Any, ...]] = {
    "role": ("user", "user", "system", "assistant", "developer"),
    "model": ("", "tiny", "smollm2-135m"),
    "content": ("hi", "what is the capital of France?", "é\U0001f6b4"),
    "text": ("once upon a time", "hi"),
    "stop": ("\n\n", "x"),
    "max_tokens": (1, 3, 20),
    "top_k": (0, 5),
    "n": (1, 2),
    "ids": (5, 6, 7),
    "token_ids": (5, 6, 7),
    "priority": (0,),
    "ctx_size": (64,),
    "n_keep": (4,),
    "n_discard": (-1, 8),
    "timeout_seconds": (0.2, 5.0),
    "append": (False,),
    "repetition_penalty": (1.0, 1.1),
    "name": ("f", "weather"),
    "parameters_json_schema": ("", '{"type": "object"}'),
    "function": ("f",),
    "tool_call_id": ("",),
    "arguments": ("{}",),
    "json_schema": ('{"type": "object"}',),
    "regex": ("[a-z]+",),
    "lark": ('start: "a"',),
}
"""By a field's name: values that are good as such."""
USUAL = frozenset({"messages", "role", "text", "name"})
"""Fields without which a request is refused before anything else is looked at."""
RISKY = frozenset(
    {"tool_calls", "tool_call_id", "tool_choice", "stop_token_ids", "min_tokens", "append", "ctx_size", "grammar"}
)
"""Fields that are refused beside most others."""
NOT_UTF8 = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xe2\x82")
DEEPEST = 4

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 7, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 5, 17, 100, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**63, 2**64 - 1),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One call: the method's name, the request's bytes, the metadata beside it."""

    method: str
    raw: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    streams: bool = False


def cases(service: ServiceDescriptor, seed: int) -> Iterator[Case]:
    """Without end; the same for the same seed."""
    draw = random.Random(seed)
    methods = list(service.methods)
    while True:
        method = draw.choice(methods)
        raw = message(method.input_type, draw).SerializeToString()
        if draw.random() < 0.3:
            raw = broken(raw, draw)
        yield Case(method.name, raw, metadata(draw), method.server_streaming)


def message(kind: Descriptor, draw: random.Random, depth: int = 0, wild: float | None = None) -> Message:
    """One with some of its fields. `wild` is the part of its values that are rare, at the edges or beyond."""
    made = message_factory.GetMessageClass(kind)()
    wild = draw.choice((0.0, 0.05, 0.6)) if wild is None else wild
    filled = draw.choice((0.15, 0.5, 0.9))
    for field in kind.fields:
        usual = 1.0 - wild if field.name in USUAL else filled
        if draw.random() < (0.03 if wild < 0.1 and field.name in RISKY else usual):
            fill(made, field, draw, depth, wild)
    return made


def fill(made: Any, field: FieldDescriptor, draw: random.Random, depth: int, wild: float) -> None:
    nested = field.message_type
    if nested is not None and nested.GetOptions().map_entry:
        entries = getattr(made, field.name)
        for _ in range(draw.choice(COUNTS)):
            key, value = nested.fields_by_name["key"], nested.fields_by_name["value"]
            entries[scalar(key, draw, wild)] = scalar(value, draw, wild)
    elif nested is not None and depth >= DEEPEST:
        return
    elif field.is_repeated:
        values = getattr(made, field.name)
        for _ in range(draw.choice(COUNTS)):
            if nested is not None:
                values.add().CopyFrom(message(nested, draw, depth + 1, wild))
            else:
                values.append(scalar(field, draw, wild))
    elif nested is not None:
        getattr(made, field.name).CopyFrom(message(nested, draw, depth + 1, wild))
    else:
        setattr(made, field.name, scalar(field, draw, wild))


def scalar(field: FieldDescriptor, draw: random.Random, wild: float) -> Any:
    kind = field.cpp_type
    if draw.random() >= wild:
        if field.name in TAME:
            return draw.choice(TAME[field.name])
        if kind != FieldDescriptor.CPPTYPE_STRING:
            return 1 if kind != FieldDescriptor.CPPTYPE_DOUBLE else 0.5
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice(TEXTS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return draw.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice([*(value.number for value in field.enum_type.values), 99])
    return draw.choice(INTEGERS[kind])


def broken(raw: bytes, draw: random.Random) -> bytes:
    """The same with something wrong in its bytes, twice in a while."""
    for _ in range(draw.choice((1, 1, 2))):
        raw = draw.choice(BREAKS)(raw, draw)
    return raw


def _flipped(raw: bytes, draw: random.Random) -> bytes:
    if not raw:
        return b"\xff"
    place = draw.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ (1 << draw.randrange(8))]) + raw[place + 1 :]


def _truncated(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def _noisy(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw) + 1)
    return raw[:place] + draw.randbytes(draw.choice((1, 8, 500))) + raw[place:]


def _not_utf8(raw: bytes, draw: random.Random) -> bytes:
    """A text field of these bytes behind the rest, at any field number of the first ones."""
    text = draw.choice(NOT_UTF8)
    return raw + bytes([draw.randint(1, 12) << 3 | 2, len(text)]) + text


def _other_wire_type(raw: bytes, draw: random.Random) -> bytes:
    number, values = draw.randint(1, 15), (b"\x07", struct.pack("<d", 1.0), b"\x02hi", b"", b"", struct.pack("<f", 1.0))
    wire = draw.randrange(6)
    return raw + bytes([number << 3 | wire]) + values[wire]


def _too_long(raw: bytes, draw: random.Random) -> bytes:
    """A length beyond the end, beyond 32 bits, or a number that never ends."""
    return raw + draw.choice(
        (b"\x0a\xff\xff\xff\x7f", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x30" + b"\xff" * 12)
    )


def _nested(raw: bytes, draw: random.Random) -> bytes:
    """Groups in groups, deeper than any parser follows."""
    return raw + b"\x0b" * draw.choice((10, 5000))


def _repeated(raw: bytes, draw: random.Random) -> bytes:
    """The same many times: what is not repeated is merged."""
    return raw * draw.choice((2, 30)) if len(raw) < 100_000 else raw


BREAKS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flipped,
    _truncated,
    _noisy,
    _not_utf8,
    _other_wire_type,
    _too_long,
    _nested,
    _repeated,
)


def metadata(draw: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    """Mostly none; headers that are read, with what no client should put there, and some that nobody reads."""
    choices: tuple[tuple[str, str | bytes], ...] = (
        ("x-session-id", draw.choice(("s2", " ", "x" * 3000, "a b", "~"))),
        ("session_id", "s2"),
        ("x-request-timeout", draw.choice(("1", "-1", "nan", "1e400", "soon", "0x10", ""))),
        ("authorization", draw.choice(("Bearer x", "Basic", "", "Bearer " + "k" * 3000))),
        ("x-noise-bin", draw.randbytes(50)),
        ("x-noise", "y" * 3000),
    )
    return tuple(draw.sample(choices, draw.choice((0, 0, 0, 1, 2))))
