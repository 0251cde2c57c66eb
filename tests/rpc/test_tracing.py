"""One trace from a client through the front end and a target's engine to a drafter behind a real stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from paceline.api import Gateway
from paceline.api.observed import Observer
from paceline.rpc import convert
from paceline.rpc.draft_client import DraftPool
from paceline.speculation.frames import DraftFrame, Hello, Open
from paceline.speculation.remote import RemoteProposer
from paceline.speculation.telemetry import DraftedSequence
from paceline.telemetry.generation import tell_drafted
from paceline.telemetry.requests import Origin
from paceline.types import Failure, SamplingParams
from paceline.v1 import inference_pb2 as pb
from tests import tiny
from tests.api.scripted import MODEL, ScriptedTargets, gateway
from tests.api.wire import EngineTargets
from tests.rpc.replicas import FINGERPRINT, LONG_S, PROMPT, DraftReplica, draft_replica, until
from tests.rpc.replicas import MODEL as LLAMA
from tests.rpc.served import stub_of
from tests.telemetry.recorded import CLIENT, CLIENT_SPAN, CLIENT_TRACE, Recorded, about, parent_of, span_id, trace_of

SERVER = f"text_completion {MODEL}"
TARGET, DRAFT = "paceline.generate", "paceline.draft"
PHASES = ["paceline.queue", "paceline.prefill", "paceline.decode"]


@dataclass
class House:
    """One of each, with a tracer for all."""

    recorded: Recorded
    gateway: Gateway
    draft: DraftReplica
    closed: list[DraftedSequence]

    async def ask(self, **params: int) -> dict[str, ReadableSpan]:
        """The spans of one request, by name."""
        prepared = await self.gateway.prepare_completion(PROMPT, SamplingParams(seed=3, ignore_eos=True, **params))
        async with await self.gateway.open(replace(prepared, origin=Origin(CLIENT))) as stream:
            async for _ in stream:
                pass
        await until(lambda: not self.draft.sequences)
        for sequence in self.closed:
            tell_drafted(self.recorded.tracer, sequence, "draft")
        return self.recorded.spans


@asynccontextmanager
async def house(drafts: bool = True) -> AsyncIterator[House]:
    recorded, closed = Recorded(), list[DraftedSequence]()
    proposer = RemoteProposer(LONG_S)
    pool = DraftPool(proposer, Hello("target", "tiny-target", FINGERPRINT))
    async with draft_replica(on_close=closed.append) as draft:
        targets = EngineTargets(tiny.engine_for(LLAMA, proposer=proposer), recorded.tracer)
        try:
            pool.set_members({"draft": draft.address} if drafts else {})
            await until(lambda: len(proposer.link_ids) == drafts)
            yield House(recorded, gateway(targets, observer=Observer(recorded.tracer, MODEL)), draft, closed)
        finally:
            await pool.close()
            targets.loop.stop()


async def test_a_trace_goes_from_the_client_through_router_and_target_to_the_drafter() -> None:
    async with house() as each:
        spans = await each.ask(max_tokens=12)
    assert parent_of(spans[SERVER]) == CLIENT_SPAN
    assert parent_of(spans[TARGET]) == span_id(spans[SERVER])
    assert parent_of(spans[DRAFT]) == span_id(spans[TARGET])
    assert {trace_of(span) for span in spans.values()} == {CLIENT_TRACE}


async def test_a_generation_s_phases_lie_in_it_one_after_the_other() -> None:
    async with house() as each:
        spans = await each.ask(max_tokens=12)
    queue, prefill, decode = (spans[name] for name in PHASES)
    assert {parent_of(span) for span in (queue, prefill, decode)} == {span_id(spans[TARGET])}
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)


async def test_a_generation_counts_tokens_and_candidates() -> None:
    async with house() as each:
        found = about((await each.ask(max_tokens=12))[TARGET])
    assert (found["gen_ai.usage.output_tokens"], found["paceline.replica"]) == (12, "target-1")
    assert found["paceline.drafted_tokens"] == found["paceline.accepted_tokens"]  # the drafter has the same model


async def test_a_drafter_counts_what_it_drafted() -> None:
    async with house() as each:
        found = about((await each.ask(max_tokens=12))[DRAFT])
        drafted = each.draft.loop.drafter.drafted_tokens
    assert (found["paceline.drafted_tokens"], found["paceline.rolled_back_tokens"]) == (drafted, 0)
    assert (found["paceline.history_tokens"], found["paceline.replica"]) == (len(PROMPT), "draft")


async def test_without_a_drafter_there_is_no_span_of_one() -> None:
    async with house(drafts=False) as each:
        spans = await each.ask(max_tokens=4)
    assert list(spans) == [*PHASES, TARGET, SERVER]


async def test_a_request_given_up_ends_its_generation() -> None:
    async with house(drafts=False) as each:
        prepared = await each.gateway.prepare_completion(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
        async with await each.gateway.open(prepared) as stream:
            await anext(stream)
        found = about(each.recorded.spans[TARGET])
    assert (found["error.type"], "gen_ai.usage.output_tokens" in found) == ("cancelled", False)


async def test_a_refusal_is_the_generation_s_error() -> None:
    async with house(drafts=False) as each:
        targets = each.gateway._targets
        request = tiny.request(PROMPT, max_tokens=4, stop_token_ids=(1,), logit_bias=((9_999, 1.0),))
        assert [type(frame) async for frame in targets.generate(request)] == [Failure]
        status = each.recorded.spans[TARGET].status
    assert status.description == "invalid_request_error"


async def test_an_untraced_sequence_is_not_told_of() -> None:
    closed: list[DraftedSequence] = []
    async with draft_replica(on_close=closed.append) as draft:
        opened = Open(1, PROMPT, SamplingParams(), 2, len(PROMPT))
        traced = replace(opened, sequence=2, trace=CLIENT)
        draft.loop.connect("t", lambda _: None)
        draft.loop.apply("t", DraftFrame(opens=(opened, traced)))
        draft.loop.disconnect("t").result(30)
    assert [each.trace for each in closed] == [CLIENT]


@pytest.mark.parametrize(("sent", "parent"), [(CLIENT, CLIENT_SPAN), ("nonsense", None)])
async def test_a_grpc_call_brings_its_trace_in_its_metadata(sent: str, parent: int | None) -> None:
    recorded = Recorded()
    async with stub_of(ScriptedTargets(), observer=Observer(recorded.tracer, MODEL)) as stub:
        metadata = grpc.aio.Metadata(("traceparent", sent), ("x-request-id", "mine-8"))
        request = pb.GenerateRequest(text="hi")
        async for _ in stub.Generate(request, metadata=metadata):
            pass
    span = recorded.spans[SERVER]
    assert (parent_of(span), about(span)["paceline.request_id"]) == (parent, "mine-8")


def test_a_frame_s_trace_that_is_none_is_dropped() -> None:
    opened = Open(1, PROMPT, SamplingParams(seed=1), 2, len(PROMPT), trace="nonsense")
    (back,) = convert.frame_from_proto(convert.frame_to_proto(DraftFrame(opens=(opened,)))).opens
    assert back.trace == ""
