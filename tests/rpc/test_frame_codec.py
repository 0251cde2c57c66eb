"""Frames as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.rpc.frame_codec import pack, unpack
from paceline.types import Delta, Failure, FinishReason, Metrics, SourceMetrics, TokenLogprobs, Verified

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple)
COUNTS = st.integers(0, 2**40)
SOURCES = st.builds(SourceMetrics, st.sampled_from(["remote", "prompt_lookup"]), TOKENS, TOKENS, COUNTS)
METRICS = st.builds(
    Metrics, prompt_tokens=COUNTS, drafted=COUNTS, ttft_s=st.floats(0, 1e6), sources=st.lists(SOURCES).map(tuple)
)
LOGPROBS = st.lists(
    st.builds(
        TokenLogprobs,
        COUNTS,
        st.floats(-100, 0),
        COUNTS,
        st.lists(st.tuples(COUNTS, st.floats(-100, 0)), max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)
VERIFIED = st.builds(Verified, st.sampled_from(["remote", "prompt_lookup"]), COUNTS, COUNTS, COUNTS)
DELTAS = st.builds(
    Delta,
    TOKENS,
    st.text(),
    st.none() | st.sampled_from(list(FinishReason)),
    st.none() | METRICS,
    st.integers(0, 127),
    LOGPROBS,
    LOGPROBS,
    st.none() | VERIFIED,
)
FAILURES = st.builds(
    Failure, st.text(), st.text(), st.none() | st.text(), st.none() | st.floats(0, 100), st.none() | st.text()
)


@given(st.lists(st.tuples(st.text(), DELTAS.filter(lambda d: d.finished or d.metrics is None) | FAILURES)))
def test_what_is_packed_is_unpacked(frames: list[tuple[str, Delta | Failure]]) -> None:
    assert unpack(pack(frames)) == frames


def test_a_step_of_one_stream_takes_few_bytes() -> None:
    assert len(pack([("chatcmpl-" + 32 * "0", Delta((123, 456), " word"))])) < 64


def test_what_is_no_message_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        unpack(b"\xc1")
