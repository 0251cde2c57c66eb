"""What of the gRPC service depends on Ray Serve's proxy: errors with their details, broken bytes, aborts, drains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import grpc
import pytest

from paceline.client import Client, Retry, Session
from paceline.errors import InvalidRequest, PacelineError, RequestTimeout, UnknownSession
from paceline.rpc.rich_errors import error_of
from paceline.types import FinishReason
from paceline.v1 import inference_pb2 as pb
from tests.fuzz.grpc import SERVICE, fuzz
from tests.fuzz.messages import cases
from tests.serve.conftest import Server

pytestmark = pytest.mark.serve

CASES = 300


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.endpoints.grpc, retry=Retry(max_attempts=1), timeout=60) as found:
        yield found


def refused(server: Server, method: str, raw: bytes) -> PacelineError:
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.endpoints.grpc, options) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(f"/paceline.v1.Inference/{method}")(raw, timeout=30))
        return error_of(caught.value.code(), caught.value.details(), caught.value.trailing_metadata())


def test_an_error_s_details_pass_the_proxy(client: Client) -> None:
    with pytest.raises(InvalidRequest) as streamed:
        client.chat("hi", top_p=9.0)
    with pytest.raises(UnknownSession) as whole:
        Session(client, "nobody").info()
    assert (streamed.value.param, whole.value.param) == ("top_p", "session_id")


@pytest.mark.parametrize("method", ["Chat", "Tokenize"])
def test_bytes_that_are_no_message_are_an_invalid_argument(server: Server, method: str) -> None:
    error = refused(server, method, b"\x12\x04\x12\x02\xc3\x28")
    assert (type(error), error.message.partition(" not ")[0]) == (InvalidRequest, "the request is")


@pytest.mark.parametrize("megabytes", [9, 100])
def test_a_request_that_is_too_large_is_an_invalid_argument(server: Server, megabytes: int) -> None:
    error = refused(server, "Tokenize", bytes(megabytes << 20))
    assert (type(error), "at most" in error.message) == (InvalidRequest, True)


def test_a_request_s_own_limit_ends_it_with_words(server: Server) -> None:
    request = pb.GenerateRequest(
        text="Once", sampling=pb.SamplingParams(max_tokens=4000, ignore_eos=True), timeout_seconds=0.3
    )
    error = refused(server, "Generate", request.SerializeToString())
    assert (type(error), error.message) == (RequestTimeout, "the request took longer than 0.3 s")


def test_a_request_is_aborted_and_its_replica_is_idle(client: Client, server: Server) -> None:
    stream = client.stream_generate("Once upon a time", max_tokens=4000, ignore_eos=True)
    assert next(stream).text
    assert client.abort(stream.started().request_id)
    assert stream.answer().finish_reason is FinishReason.ABORT
    server.wait_for(lambda status: not any(t["running"] or t["waiting"] for t in status["targets"]), timeout_s=20)


def test_a_stream_that_is_closed_frees_its_place(client: Client, server: Server) -> None:
    stream = client.stream_generate("Once upon a time", max_tokens=4000, ignore_eos=True)
    next(stream)
    stream.close()
    server.wait_for(lambda status: not any(t["running"] or t["waiting"] for t in status["targets"]), timeout_s=20)


def test_a_drained_replica_has_given_its_sessions_away(client: Client) -> None:
    session = client.session("to-drain")
    before = session.say("Hi", max_tokens=4).replica_id
    relief = client.drain(before, wait=10)
    assert "to-drain" in relief.moved
    assert session.info().replica_id == relief.moved["to-drain"] != before
    session.delete()


def test_the_status_tells_of_replicas_and_drafts(client: Client) -> None:
    status = client.status()
    assert (len(status.targets), len(status.drafts)) == (2, 2)
    assert {target.drafters_connected for target in status.targets} == {2}


async def test_no_request_is_an_internal_error(server: Server) -> None:
    report = await fuzz(server.endpoints.grpc, islice(cases(SERVICE, 2), CASES))
    assert report.findings == []
