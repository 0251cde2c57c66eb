"""Drafting over real sockets: the same tokens whatever the drafters do, and the drafters' own view of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.rpc import convert, draft_client
from paceline.rpc.draft_server import start_draft_server
from paceline.speculation.frames import (
    Advance,
    Candidates,
    DraftFailureReason,
    DraftFrame,
    Hello,
    Open,
    SparseRow,
)
from paceline.types import Grammar, SamplingParams
from paceline.v1 import draft_pb2 as pb
from paceline.v1.draft_pb2_grpc import DraftServicer, DraftStub, add_DraftServicer_to_server
from tests import schemas
from tests.rpc.replicas import (
    FINGERPRINT,
    HOST,
    OTHER,
    PROMPT,
    SEEDED,
    DraftReplica,
    TargetReplica,
    draft_replica,
    metrics,
    plain,
    target_replica,
    tokens,
    until,
)


@pytest.fixture
async def draft() -> AsyncIterator[DraftReplica]:
    async with draft_replica() as made:
        yield made


@pytest.fixture
async def target() -> AsyncIterator[TargetReplica]:
    async with target_replica() as made:
        yield made


# A healthy drafter.


@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
async def test_tokens_equal_plain_decoding(draft: DraftReplica, target: TargetReplica, params: dict[str, Any]) -> None:
    await target.connect(draft.address)
    assert tokens(await target.generate(**params)) == plain(**params)


async def test_a_drafter_keeps_to_the_grammar(draft: DraftReplica, target: TargetReplica) -> None:
    params = {**SEEDED, "grammar": Grammar("regex", "[0-9]{20}")}
    alone = await target.generate(**params)
    await target.connect(draft.address)
    drafted = await target.generate(**params)
    assert tokens(drafted) == tokens(alone)
    assert schemas.tokenizer().decode(tokens(drafted)).isdigit()
    assert metrics(drafted).accepted == metrics(drafted).drafted > 0


@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
async def test_every_candidate_of_the_same_weights_is_accepted(
    draft: DraftReplica, target: TargetReplica, params: dict[str, Any]
) -> None:
    await target.connect(draft.address)
    found = metrics(await target.generate(**params))
    assert found.drafted == found.accepted > 0


async def test_a_drafter_of_other_weights_changes_no_token(target: TargetReplica) -> None:
    async with draft_replica(OTHER) as draft:
        await target.connect(draft.address)
        deltas = await target.generate(**SEEDED)
    assert (tokens(deltas), metrics(deltas).drafted > 0) == (plain(**SEEDED), True)


async def test_a_drafter_s_window_shifts_where_the_target_s_does(draft: DraftReplica, target: TargetReplica) -> None:
    params = SEEDED | {"max_tokens": 90, "ctx_size": 24}
    await target.connect(draft.address)
    deltas = await target.generate(**params)
    found = metrics(deltas)
    assert tokens(deltas) == plain(**params)
    assert found.drafted == found.accepted > 30


async def test_several_requests_at_once_share_one_stream(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    seeds = range(4)
    every = [dict(name=str(seed), **SEEDED | {"seed": seed}) for seed in seeds]
    found = await asyncio.gather(*(target.generate(**params) for params in every))
    assert [tokens(deltas) for deltas in found] == [plain(**SEEDED | {"seed": seed}) for seed in seeds]
    assert list(draft.service.streams.values()) == ["target"]


async def test_a_finished_request_is_closed_at_the_drafter(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    await target.generate()
    await until(lambda: draft.sequences == 0)
    assert (await asyncio.wrap_future(draft.loop.call(draft.loop.drafter.kv.usage))).in_use == 0


async def test_two_targets_share_a_drafter(draft: DraftReplica, target: TargetReplica) -> None:
    async with target_replica("second") as second:
        await target.connect(draft.address)
        await second.connect(draft.address)
        found = await asyncio.gather(target.generate(), second.generate(**SEEDED))
        assert sorted(draft.service.streams.values()) == ["second", "target"]
    assert [tokens(deltas) for deltas in found] == [plain(), plain(**SEEDED)]
    assert all(metrics(deltas).accepted == metrics(deltas).drafted > 0 for deltas in found)


async def test_a_target_that_leaves_frees_its_sequences(draft: DraftReplica) -> None:
    async with target_replica() as target:
        await target.connect(draft.address)
        target.proposer.open(99, PROMPT, SamplingParams(seed=1))
        await until(lambda: draft.sequences == 1)
    await until(lambda: draft.sequences == 0 and not draft.service.streams)
    assert draft.loop.healthy


async def test_a_top_k_beyond_the_wire_s_numbers_is_off(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    deltas = await target.generate(**SEEDED, top_k=2**40)
    assert metrics(deltas).accepted == metrics(deltas).drafted > 0


# Drafters that fail.


async def test_a_drafter_killed_in_the_middle_changes_no_token(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    killing: list[asyncio.Task[None]] = []

    def kill(n: int) -> None:
        if n >= 40 and not killing:
            killing.append(asyncio.create_task(draft.kill()))

    deltas = await target.generate(kill, **SEEDED, max_tokens=400)
    await killing[0]
    # Runs of five until then, single tokens afterwards.
    assert (tokens(deltas) == plain(**SEEDED, max_tokens=400), metrics(deltas).steps > 200) == (True, True)


async def test_a_killed_drafter_has_no_link_and_a_reason(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    await draft.kill()
    await until(lambda: target.pool.problems)
    assert (target.proposer.link_ids, list(target.pool.problems)) == ([], [draft.address])


async def test_a_drafter_that_comes_back_drafts_again(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    await draft.kill()
    await until(lambda: not target.proposer.link_ids)
    await draft.start()
    await until(lambda: target.proposer.link_ids)
    assert metrics(await target.generate()).drafted > 0


async def test_a_drafter_that_comes_back_has_no_problem(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    await draft.kill()
    await until(lambda: target.pool.problems)
    await draft.start()
    await until(lambda: target.proposer.link_ids)
    assert target.pool.problems == {}


async def test_an_outage_after_a_long_life_is_retried_at_once_again(
    draft: DraftReplica, target: TargetReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        if seconds >= draft_client.FIRST_RETRY_S:
            pauses.append(seconds)
        await sleep(0.005)

    monkeypatch.setattr(draft_client.asyncio, "sleep", recorded)
    await target.connect(draft.address)
    for _ in range(3):
        pauses.clear()
        await draft.kill()
        await until(lambda: pauses)
        await draft.start()
        await until(lambda: target.proposer.link_ids)
        assert pauses[0] == draft_client.FIRST_RETRY_S


async def test_another_tokenizer_is_a_problem_with_a_name(target: TargetReplica) -> None:
    async with draft_replica(fingerprint="other") as draft:
        target.pool.set_members({"d": draft.address})
        await until(lambda: target.pool.problems)
        assert (target.pool.problems["d"], target.proposer.link_ids, draft.service.streams) == (
            "FAILED_PRECONDITION: draft 'tiny-draft' and target 'tiny-target' have different tokenizers",
            [],
            {},
        )


async def test_an_address_nobody_listens_at_is_a_problem(target: TargetReplica) -> None:
    server, address = await black_hole()
    server.close()
    await server.wait_closed()
    target.pool.set_members({"d": address})
    await until(lambda: target.pool.problems)
    assert target.pool.problems["d"].startswith("UNAVAILABLE")


async def black_hole() -> tuple[asyncio.Server, str]:
    """Accepts connections and never says a word."""

    async def swallow(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(swallow, HOST, 0)
    return server, f"{HOST}:{server.sockets[0].getsockname()[1]}"


async def test_a_drafter_that_swallows_connections_delays_nobody(target: TargetReplica) -> None:
    server, address = await black_hole()
    target.pool.set_members({"d": address})
    deltas = await target.generate()  # with a draft timeout of LONG_S for each step
    server.close()
    assert (tokens(deltas), target.proposer.stats.links_rested) == (plain(), 0)


async def test_a_drafter_that_does_not_answer_in_time_is_a_problem(
    target: TargetReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_client, "CONNECT_TIMEOUT_S", 0.05)
    server, address = await black_hole()
    target.pool.set_members({"d": address})
    await until(lambda: target.pool.problems)
    server.close()
    assert target.pool.problems == {"d": "no answer within 0.05 s"}


class Scripted(DraftServicer):
    """Says hello, then what it is told to for each request."""

    def __init__(self, answer: Callable[[pb.DraftRequest], list[Candidates]] = lambda _: []) -> None:
        self.heard: list[DraftFrame] = []
        self._answer = answer

    async def Speculate(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DraftReply]:
        await anext(request_iterator)
        yield pb.DraftReply(hello=convert.hello_to_proto(Hello("scripted", "tiny", FINGERPRINT)))
        async for request in request_iterator:
            self.heard.append(convert.frame_from_proto(request))
            if answer := self._answer(request):
                yield convert.candidates_to_proto(answer)


@asynccontextmanager
async def serving(servicer: DraftServicer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_DraftServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(None)


async def test_a_drafter_that_never_speaks_changes_no_token_and_is_never_waited_for() -> None:
    async with serving(Scripted()) as address, target_replica() as target:
        await target.connect(address)
        assert (tokens(await target.generate()), target.proposer.stats.waits) == (plain(), 0)


async def test_a_drafter_that_falls_silent_costs_one_deadline() -> None:
    """It acknowledges the prompt and says nothing more."""

    def acknowledge(request: pb.DraftRequest) -> list[Candidates]:
        return [Candidates(opened.sequence, len(opened.tokens)) for opened in request.open]

    async with serving(Scripted(acknowledge)) as address, target_replica(timeout_s=0.02) as target:
        await target.connect(address)
        deltas = await target.generate(max_tokens=100)
        assert (tokens(deltas), target.proposer.stats.missed) == (plain(max_tokens=100), 1)


async def test_nonsense_from_a_drafter_changes_no_token() -> None:
    def nonsense(request: pb.DraftRequest) -> list[Candidates]:
        return [Candidates(a.sequence, a.base + len(a.tokens), (2**32 - 1, 5, 7, 9)) for a in request.advance]

    async with serving(Scripted(nonsense)) as address, target_replica() as target:
        await target.connect(address)
        assert tokens(await target.generate()) == plain()


@pytest.mark.parametrize("reason", list(DraftFailureReason))
async def test_failures_from_a_drafter_change_no_token(reason: DraftFailureReason) -> None:
    def fail(request: pb.DraftRequest) -> list[Candidates]:
        return [Candidates(step.sequence, step.base, failure=reason) for step in request.advance]

    async with serving(Scripted(fail)) as address, target_replica() as target:
        await target.connect(address)
        assert tokens(await target.generate()) == plain()


# Membership.


async def test_a_drafter_that_left_the_members_gets_nothing_new(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    target.pool.set_members({})
    assert metrics(await target.generate()).drafted == 0


async def test_a_drafter_that_left_keeps_its_stream(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    target.pool.set_members({})
    assert target.proposer.link_ids == [draft.address]


async def test_a_drafter_that_left_is_not_connected_to_again(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    target.pool.set_members({})
    await draft.kill()
    await until(lambda: not target.pool._tasks)
    assert (target.proposer.link_ids, target.pool.problems) == ([], {})


async def test_a_drafter_that_left_and_returned_drafts_again(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    target.pool.set_members({})
    await target.connect(draft.address)
    assert metrics(await target.generate()).drafted > 0


async def test_closing_the_pool_ends_every_stream(draft: DraftReplica, target: TargetReplica) -> None:
    await target.connect(draft.address)
    await target.pool.close()
    await until(lambda: not draft.service.streams)
    assert target.proposer.link_ids == []


# The server's side.


async def refused(draft: DraftReplica, *requests: pb.DraftRequest) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(draft.address, draft_client.CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in DraftStub(channel).Speculate(iter(requests)):
                pass
    code: grpc.StatusCode = caught.value.code()
    return code


HELLO = pb.DraftRequest(hello=convert.hello_to_proto(Hello("t", "m", FINGERPRINT)))


async def test_a_stream_that_ends_without_a_hello_is_refused(draft: DraftReplica) -> None:
    assert await refused(draft) == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_sampling_out_of_range_is_an_invalid_argument(draft: DraftReplica) -> None:
    bad = pb.DraftRequest(open=[pb.Open(sequence=1, tokens=[5], sampling=pb.DraftSampling(top_p=2.0), depth=1)])
    assert await refused(draft, HELLO, bad) == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_drafter_whose_thread_ended_is_unavailable(draft: DraftReplica) -> None:
    await asyncio.to_thread(draft.loop.stop)
    assert await refused(draft, HELLO) == grpc.StatusCode.UNAVAILABLE


async def test_a_refused_stream_leaves_nothing_behind(draft: DraftReplica) -> None:
    await asyncio.to_thread(draft.loop.stop)
    await refused(draft, HELLO)
    assert draft.service.streams == {}


async def test_a_taken_port_names_the_setting(draft: DraftReplica) -> None:
    port = int(draft.address.rpartition(":")[2])
    with pytest.raises(OSError, match=f"draft.port: cannot listen on {HOST}:{port}"):
        await start_draft_server(draft.service, HOST, port)


# The wire.

numbers = st.integers(0, 2**32 - 1)
sequences = st.integers(0, 2**64 - 1)
token_lists = st.lists(numbers, max_size=8).map(tuple)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.none(),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=numbers,
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
opens = st.lists(
    st.builds(Open, sequences, token_lists, sampling, numbers, numbers, numbers, st.booleans()), max_size=3
).map(tuple)
advances = st.lists(st.builds(Advance, sequences, numbers, token_lists, numbers), max_size=3).map(tuple)
frames = st.builds(DraftFrame, opens, advances, st.lists(sequences, max_size=3).map(tuple))
rows = st.lists(st.tuples(numbers, st.floats(0, 1, width=32)), max_size=4).map(
    lambda pairs: SparseRow(tuple(token for token, _ in pairs), tuple(prob for _, prob in pairs))
)
drafted = st.lists(
    st.builds(
        lambda sequence, base, pairs, with_probs, offset, final: Candidates(
            sequence,
            base,
            tuple(token for token, _ in pairs),
            offset=offset,
            probs=tuple(row for _, row in pairs) if with_probs else (),
            final=final,
        ),
        sequences,
        numbers,
        st.lists(st.tuples(numbers, rows), max_size=4),
        st.booleans(),
        numbers,
        st.booleans(),
    ),
    max_size=3,
)
failures = st.lists(
    st.builds(Candidates, sequences, numbers, st.just(()), st.sampled_from(DraftFailureReason)), max_size=3
)


@given(frames)
def test_a_frame_survives_the_wire(frame: DraftFrame) -> None:
    wire = convert.frame_to_proto(frame).SerializeToString()
    assert convert.frame_from_proto(pb.DraftRequest.FromString(wire)) == frame


@given(drafted, failures)
def test_replies_survive_the_wire(candidates: list[Candidates], failed: list[Candidates]) -> None:
    wire = convert.candidates_to_proto(candidates + failed).SerializeToString()
    assert convert.candidates_from_proto(pb.DraftReply.FromString(wire)) == candidates + failed


@given(st.builds(Hello, st.text(), st.text(), st.text()))
def test_a_hello_survives_the_wire(hello: Hello) -> None:
    wire = convert.hello_to_proto(hello).SerializeToString()
    assert convert.hello_from_proto(pb.Hello.FromString(wire)) == hello


@given(st.integers(-(2**63), -1))
def test_a_negative_seed_crosses_as_its_unsigned_twin(seed: int) -> None:
    frame = DraftFrame(opens=(Open(1, (5,), SamplingParams(seed=seed), 1, 1),))
    assert convert.frame_from_proto(convert.frame_to_proto(frame)).opens[0].params.seed == seed + 2**64


def test_what_only_the_target_needs_does_not_cross() -> None:
    params = SamplingParams(seed=1, stop=("x",), stop_token_ids=(3,), max_tokens=9, ignore_eos=True)
    frame = DraftFrame(opens=(Open(1, (5,), params, 1, 1),))
    assert convert.frame_from_proto(convert.frame_to_proto(frame)).opens[0].params == SamplingParams(
        seed=1, max_tokens=None
    )


def test_an_unknown_failure_reason_is_internal() -> None:
    message = pb.DraftReply(failure=[pb.DraftFailure(sequence=4, reason=99)])  # type: ignore[arg-type]
    assert convert.candidates_from_proto(message) == [Candidates(4, 0, failure=DraftFailureReason.INTERNAL)]


def test_rows_that_do_not_go_with_the_tokens_are_left_out() -> None:
    odd = pb.Candidates(sequence=4, base=2, tokens=[5, 6], probs=[pb.SparseRow(ids=[5], probs=[1.0])])
    assert convert.candidates_from_proto(pb.DraftReply(candidates=[odd])) == [Candidates(4, 2, (5, 6))]
