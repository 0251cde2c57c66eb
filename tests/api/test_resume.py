"""A replica that dies in the middle of an answer: another goes on, and the client notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from paceline.api import resume as resume_module
from paceline.api.resume import RouterCounts, resuming
from paceline.api.stream import Stream
from paceline.errors import EngineError, InvalidRequest, Overloaded, PacelineError, RequestTimeout, Unavailable
from paceline.types import Accepted, Delta, Failure, FinishReason, Frame, Metrics, Request, SamplingParams

LETTERS = "abcdefgh"
REQUEST = Request("r", (1, 2, 3), SamplingParams(seed=7, max_tokens=len(LETTERS)), session_id="s")


class Dying:
    """Target replicas that spell the alphabet, one letter a delta. Each attempt ends as the script says.

    A number: so many deltas, then the process is gone. An error: raised instead of an answer. A Failure: the
    replica's own word, after two deltas.
    """

    def __init__(self, *script: int | Exception | Failure) -> None:
        self.script = list(script)
        self.requests: list[Request] = []
        self.closed = 0

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        self.requests.append(request)
        what = self.script.pop(0) if self.script else len(LETTERS)
        name = f"target-{len(self.requests)}"
        try:
            if isinstance(what, Exception):
                raise what
            yield Accepted(name, 7, len(request.token_ids))
            frames = spelled(request)
            for delta in frames[: what if isinstance(what, int) else 2]:
                yield delta
            if isinstance(what, Failure):
                yield what
            elif what < len(frames):
                raise Unavailable("the replica serving this request was lost; send it again")
        finally:
            self.closed += 1


def spelled(request: Request) -> list[Delta]:
    """What is missing of each output, in turn."""
    found = []
    for choice in request.choices():
        begun = len(choice.output)
        for n in range(begun, len(LETTERS)):
            last = n == len(LETTERS) - 1
            metrics = Metrics(3, 0, len(LETTERS), ttft_s=0.25, total_s=0.5) if last else None
            reason = FinishReason.LENGTH if last else None
            found.append(Delta((n,), LETTERS[n], reason, metrics, index=choice.index))
    return found


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_module, "FIRST_PAUSE_S", 0.0)


async def frames_of(targets: Dying, request: Request = REQUEST, limit: int = 3) -> list[Frame]:
    return [frame async for frame in resuming(targets.generate, request, limit)]


def texts(frames: Sequence[Frame]) -> list[str]:
    return [frame.text for frame in frames if isinstance(frame, Delta)]


@pytest.mark.parametrize("cut", range(len(LETTERS)))
async def test_cut_anywhere_each_token_comes_once(cut: int) -> None:
    targets = Dying(cut)
    frames = await frames_of(targets)
    assert texts(frames) == list(LETTERS)
    assert [request.output for request in targets.requests] == [(), tuple(range(cut))]


async def test_the_client_sees_one_acceptance() -> None:
    frames = await frames_of(Dying(3, 2))
    assert [frame for frame in frames if isinstance(frame, Accepted)] == [Accepted("target-1", 7, 3)]


async def test_what_goes_on_is_the_same_request_under_another_id() -> None:
    targets = Dying(3)
    await frames_of(targets)
    assert targets.requests[1] == replace(REQUEST, request_id="r+1", resumed=((0, 1, 2),), avoid=("target-1",))


async def test_every_lost_replica_is_avoided() -> None:
    targets = Dying(3, 1, 1)
    await frames_of(targets)
    assert targets.requests[-1].avoid == ("target-1", "target-2", "target-3")
    assert targets.requests[-1].output == (0, 1, 2, 3, 4)


async def test_a_replica_that_fails_before_it_accepts_is_avoided_by_its_name() -> None:
    targets = Dying(2)

    async def generate(request: Request) -> AsyncIterator[Frame]:
        if len(targets.requests) == 1:
            targets.requests.append(request)
            yield Failure.of(Unavailable("the replica has stopped"), "target-x")
            return
        async for frame in targets.generate(request):
            yield frame

    frames = [frame async for frame in resuming(generate, REQUEST, 3)]
    assert texts(frames) == list(LETTERS)
    assert targets.requests[-1].avoid == ("target-1", "target-x")


@pytest.mark.parametrize("error", [Unavailable("the replica is shutting down"), EngineError("the engine failed")])
async def test_a_replica_that_says_it_cannot_go_on_is_replaced(error: PacelineError) -> None:
    assert texts(await frames_of(Dying(Failure.of(error)))) == list(LETTERS)


async def test_frames_that_end_early_are_a_loss() -> None:
    calls = 0

    async def generate(request: Request) -> AsyncIterator[Frame]:
        nonlocal calls
        calls += 1
        yield Accepted("t", 7, 3)
        for delta in spelled(request)[: 2 if calls == 1 else None]:
            yield delta

    assert texts([frame async for frame in resuming(generate, REQUEST, 1)]) == list(LETTERS)


async def test_losses_are_made_good_a_bounded_number_of_times() -> None:
    targets = Dying(1, 1, 1)
    with pytest.raises(Unavailable, match="was lost"):
        await frames_of(targets, limit=2)
    assert len(targets.requests) == targets.closed == 3


async def test_without_resumptions_a_loss_is_an_error() -> None:
    targets = Dying(3)
    with pytest.raises(Unavailable, match="was lost"):
        await frames_of(targets, limit=0)
    assert len(targets.requests) == 1


@pytest.mark.parametrize("error", [InvalidRequest("prompt: too long", param="prompt"), Overloaded("full")])
async def test_a_refusal_is_no_loss(error: PacelineError) -> None:
    targets = Dying(error)
    with pytest.raises(type(error)):
        await frames_of(targets)
    assert len(targets.requests) == 1


async def test_an_accepted_request_waits_while_the_others_are_full() -> None:
    busy = [Overloaded("full", retry_after=0.001) for _ in range(9)]
    targets = Dying(4, *busy)
    assert texts(await frames_of(targets, limit=1)) == list(LETTERS)
    assert len(targets.requests) == 11


class Ending:
    """The only replica loses a rank and says so until the next is there: refuses so many attempts, then answers."""

    def __init__(self, refusals: int, then: Dying) -> None:
        self.refusals, self.then = refusals, then

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        if self.then.requests and self.refusals:
            self.refusals -= 1
            yield Failure.of(Unavailable("rank 1 was lost"), "target-1")
            return
        async for frame in self.then.generate(request):
            yield frame


async def test_replicas_that_refuse_because_they_end_are_no_losses() -> None:
    ending, seen = Ending(50, Dying(4)), RouterCounts()
    frames = [frame async for frame in resuming(ending.generate, REQUEST, 1, seen=seen)]
    assert (texts(frames), seen.resumptions) == (list(LETTERS), 1)


async def test_a_replica_that_refuses_is_avoided_once() -> None:
    ending = Ending(50, Dying(4))
    assert texts([frame async for frame in resuming(ending.generate, REQUEST, 1)]) == list(LETTERS)
    assert ending.then.requests[-1].avoid == ("target-1",)


async def test_without_resumptions_a_refusal_is_an_error() -> None:
    async def generate(request: Request) -> AsyncIterator[Frame]:
        yield Failure.of(Unavailable("rank 1 was lost"), "target-1")

    with pytest.raises(Unavailable, match="rank 1 was lost"):
        [frame async for frame in resuming(generate, REQUEST, 0)]


@pytest.mark.parametrize(("count", "pause"), [(1, 0.0), (2, 0.1), (3, 0.2), (4, 0.4), (6, 1.0), (5000, 1.0)])
def test_pauses_grow_to_a_second(count: int, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_module, "FIRST_PAUSE_S", 0.1)
    assert resume_module._pause(count) == pause


async def test_refusals_last_no_longer_than_the_request() -> None:
    async def generate(request: Request) -> AsyncIterator[Frame]:
        await asyncio.sleep(0)
        yield Failure.of(Unavailable("rank 1 was lost"), "target-1")

    with pytest.raises(RequestTimeout):
        await Stream.open(resuming(generate, REQUEST, 1), timeout_s=0.05)


async def test_a_loss_after_the_last_token_is_none() -> None:
    async def generate(request: Request) -> AsyncIterator[Frame]:
        yield Accepted("t", 7, 3)
        for delta in spelled(request):
            yield delta
        raise Unavailable("was lost")

    assert texts([frame async for frame in resuming(generate, REQUEST, 3)]) == list(LETTERS)


async def test_of_several_outputs_the_finished_ones_are_not_computed_again() -> None:
    request = replace(REQUEST, params=replace(REQUEST.params, n=2))
    targets = Dying(len(LETTERS) + 3)
    frames = await frames_of(targets, request)
    assert targets.requests[1].resumed == (None, (0, 1, 2))
    for index in (0, 1):
        given = [frame.text for frame in frames if isinstance(frame, Delta) and frame.index == index]
        assert given == list(LETTERS)


async def test_the_last_metrics_cover_the_whole_request() -> None:
    times = iter([0.0, 1.0, *(2.0 + n for n in range(99))])
    frames = [frame async for frame in resuming(Dying(2).generate, REQUEST, 3, clock=lambda: next(times))]
    (metrics,) = [frame.metrics for frame in frames if isinstance(frame, Delta) and frame.metrics]
    # Created at 0, asked at 1, the first token at 2, the second at 3, asked again at 4.
    assert metrics == Metrics(3, 0, len(LETTERS), ttft_s=2.0, total_s=4.5, resumptions=1)


async def test_undisturbed_metrics_stay_as_they_are() -> None:
    frames = await frames_of(Dying())
    assert frames[-1] == spelled(REQUEST)[-1]


async def test_the_deadline_holds_across_resumptions() -> None:
    async def generate(request: Request) -> AsyncIterator[Frame]:
        yield Accepted("t", 7, 3)
        await asyncio.sleep(0.005)
        raise Unavailable("was lost")

    stream = await Stream.open(resuming(generate, REQUEST, 10**6), timeout_s=0.1)
    with pytest.raises(RequestTimeout):
        async for _ in stream:
            raise AssertionError


async def test_leaving_closes_the_replica_that_answers_now() -> None:
    targets = Dying(2)
    frames = resuming(targets.generate, REQUEST, 3)
    async for frame in frames:
        if isinstance(frame, Delta) and frame.text == "d":
            break
    await frames.aclose()
    assert targets.closed == len(targets.requests) == 2
