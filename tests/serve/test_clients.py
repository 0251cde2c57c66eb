"""The clients people have: the official openai client, a gRPC client of the published stubs, plain HTTP."""

from __future__ import annotations

import grpc
import httpx
import openai
import pytest

from paceline.v1 import inference_pb2 as pb
from paceline.v1.inference_pb2_grpc import InferenceStub
from tests.serve.conftest import Server

pytestmark = pytest.mark.serve

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.endpoints.http + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def stub(server: Server) -> InferenceStub:
    return InferenceStub(grpc.insecure_channel(server.endpoints.grpc))


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="smollm2-135m", messages=FRANCE, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 2


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2-135m", prompt="The capital of France is", temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_penalized_choices_with_logprobs_are_the_same_with_and_without_drafts(client: openai.OpenAI) -> None:
    asked = {"temperature": 0.9, "seed": 3, "max_tokens": 20, "n": 3, "logprobs": True, "top_logprobs": 2}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {"260": -5}}
    told = []
    for speculation in (True, False):
        extra = {"speculation": speculation, "repetition_penalty": 1.1, "min_tokens": 12}
        answer = client.chat.completions.create(  # type: ignore[call-overload]
            model="smollm2-135m", messages=FRANCE, extra_body=extra, **asked, **penalties
        )
        told.append([[token.token for token in choice.logprobs.content] for choice in answer.choices])
        assert (answer.model_extra["paceline"]["drafted_tokens"] > 0) is speculation
    assert told[0] == told[1]
    assert len({tuple(tokens) for tokens in told[0]}) == 3


def test_the_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2-135m"]


def test_grpc_streams_a_chat(stub: InferenceStub) -> None:
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content=FRANCE[0]["content"])],
        sampling=pb.SamplingParams(temperature=0, max_tokens=32),
        session_id="grpc-1",
    )
    events = list(stub.Chat(request, timeout=60))
    assert [events[0].WhichOneof("event"), events[-1].WhichOneof("event")] == ["started", "finished"]
    assert "".join(event.tokens.text for event in events) == ANSWER
    assert events[-1].finished.usage.accepted_tokens > 0


def test_grpc_generates_from_token_ids(stub: InferenceStub) -> None:
    ids = stub.Tokenize(pb.TokenizeRequest(text="The capital of France is"), timeout=30).token_ids
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(temperature=0, max_tokens=4)
    )
    text = "".join(event.tokens.text for event in stub.Generate(request, timeout=60))
    assert text.startswith(" Paris")


def test_grpc_streams_several_outputs(stub: InferenceStub) -> None:
    sampling = pb.SamplingParams(seed=3, max_tokens=6, ignore_eos=True, n=2, logprobs=1, prompt_logprobs=0)
    events = list(stub.Generate(pb.GenerateRequest(text="The capital of France is", sampling=sampling), timeout=60))
    counts = [sum(len(e.tokens.logprobs) for e in events if e.tokens.index == index) for index in range(2)]
    assert counts == [6, 6]
    assert sorted(e.finished.index for e in events if e.WhichOneof("event") == "finished") == [0, 1]
    assert sum(len(e.tokens.prompt_logprobs) for e in events) == events[0].started.prompt_tokens - 1


def test_grpc_refuses_bad_input_by_name(stub: InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(pb.ChatRequest(messages=[], model="smollm2-135m"), timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "messages" in caught.value.details()


def test_grpc_session_calls(stub: InferenceStub) -> None:
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content="Hi")], sampling=pb.SamplingParams(max_tokens=4), session_id="s-grpc"
    )
    list(stub.Chat(request, timeout=60))
    assert stub.GetSession(pb.GetSessionRequest(session_id="s-grpc"), timeout=30).cached_tokens > 0
    stub.CloseSession(pb.CloseSessionRequest(session_id="s-grpc"), timeout=30)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetSession(pb.GetSessionRequest(session_id="s-grpc"), timeout=30)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_follow_up_returns_to_its_replica_and_its_cache(server: Server) -> None:
    first = server.post(
        "/v1/chat/completions", {"messages": FRANCE, "temperature": 0, "session_id": "two-turns", "max_tokens": 32}
    ).json()
    answer = first["choices"][0]["message"]
    follow_up = [*FRANCE, {"role": answer["role"], "content": answer["content"]}, {"role": "user", "content": "Why?"}]
    second = server.post(
        "/v1/chat/completions", {"messages": follow_up, "temperature": 0, "session_id": "two-turns", "max_tokens": 8}
    ).json()
    assert second["paceline"]["replica_id"] == first["paceline"]["replica_id"]
    # All of the first turn; its last token only if it came out of a verified run, else it was never fed back.
    assert 0 <= first["usage"]["total_tokens"] - second["paceline"]["cached_tokens"] <= 1


def test_sessions_spread_over_the_targets(server: Server) -> None:
    body = {"messages": FRANCE, "temperature": 0, "max_tokens": 1}
    replicas = {
        server.post("/v1/chat/completions", {**body, "session_id": f"spread-{n}"}).json()["paceline"]["replica_id"]
        for n in range(6)
    }
    assert len(replicas) == 2


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 9000}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ],
)
def test_bad_input_is_refused_by_name(server: Server, change: dict[str, object], status: int, param: str) -> None:
    response = server.post("/v1/chat/completions", {"model": "smollm2-135m", "messages": FRANCE, **change})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"messages": FRANCE, "stream": True, "max_tokens": 4000, "ignore_eos": True, "temperature": 0}
    with httpx.stream("POST", server.endpoints.http + "/v1/chat/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    server.wait_for(lambda status: not any(t["running"] or t["waiting"] for t in status["targets"]), timeout_s=20)
