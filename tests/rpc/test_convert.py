"""The draft protocol on the wire: what the target says is what the drafter hears."""

from __future__ import annotations

from typing import get_args

import pytest

from paceline.rpc.convert import frame_from_proto, frame_to_proto
from paceline.speculation.frames import Advance, DraftFrame, Open
from paceline.types import Grammar, GrammarKind, SamplingParams
from paceline.v1 import draft_pb2 as pb

PLAIN = SamplingParams(max_tokens=None, seed=7)
EVERYTHING = SamplingParams(
    max_tokens=None,
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=2**64 - 1,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=-0.2,
    logit_bias={5: 1.1, 70000: -100.0},
    min_tokens=300,
    stop_token_ids=(2, 9),
)


IN_WINDOW = SamplingParams(max_tokens=None, seed=7, ctx_size=64, n_keep=0, n_discard=9)


WITHIN = [
    SamplingParams(max_tokens=None, seed=7, grammar=Grammar(kind, "{}", (2, 7))) for kind in get_args(GrammarKind)
]


@pytest.mark.parametrize(
    "params", [PLAIN, EVERYTHING, IN_WINDOW, *WITHIN], ids=["plain", "everything", "window", *get_args(GrammarKind)]
)
def test_a_frame_survives_the_wire(params: SamplingParams) -> None:
    frame = DraftFrame((Open(3, (1, 2, 3), params, 4, 2),), (Advance(5, 7, (8, 9), 2),), (6,))
    message = pb.DraftRequest.FromString(frame_to_proto(frame).SerializeToString())
    assert frame_from_proto(message) == frame


def test_stop_ids_cross_only_if_they_are_masked() -> None:
    frame = DraftFrame((Open(3, (1,), SamplingParams(seed=7, stop_token_ids=(2,)), 0, 1),))
    assert list(frame_to_proto(frame).open[0].sampling.stop_token_ids) == []


def test_a_kind_of_grammar_that_is_not_known_is_one_nobody_can_compile() -> None:
    message = frame_to_proto(DraftFrame((Open(3, (1,), WITHIN[0], 0, 1),)))
    message.open[0].sampling.grammar.kind = 99  # type: ignore[assignment]
    assert frame_from_proto(message).opens[0].params.grammar == Grammar("lark", "")
