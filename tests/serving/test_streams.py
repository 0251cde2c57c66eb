"""Aborting ends a request for its client, behind what was said already."""

from __future__ import annotations

from paceline.serving.streams import Streams
from paceline.types import Delta, FinishReason, Request, SamplingParams


def request(name: str, n: int = 1) -> Request:
    return Request(name, (1, 2), SamplingParams(n=n, seed=1))


def test_every_output_that_goes_on_is_told() -> None:
    streams = Streams()
    with streams.open(request("r", n=3)) as stream:
        stream.unfinished.discard(1)
        stream.frames.put_nowait(Delta((5,), "a"))
        assert streams.abort("r") == [stream]
        told = [stream.frames.get_nowait() for _ in range(3)]
    assert told == [Delta((5,), "a"), *(Delta((), "", FinishReason.ABORT, index=n) for n in (0, 2))]
    assert stream.aborted


def test_an_attempt_to_go_on_elsewhere_is_the_same_request() -> None:
    streams = Streams()
    with streams.open(request("r+2")) as resumed, streams.open(request("r2")) as other:
        assert streams.abort("r") == [resumed]
    assert not other.aborted


def test_one_that_is_over_is_not_open() -> None:
    streams = Streams()
    with streams.open(request("r")):
        pass
    assert streams.abort("r") == []
