from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from paceline.cli.client import ChatOptions, Client, Message, Step, sse_events
from paceline.errors import (
    ConfigError,
    EngineError,
    InvalidRequest,
    Overloaded,
    PacelineError,
    Unavailable,
    UnknownSession,
)
from paceline.ports import free_ports
from paceline.types import Metrics
from tests.cli.fakes import FakeServer, Refusal, answer_events, refusal

HELLO = [Message("user", "hi")]


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


def ignore(text: str) -> None:
    pass


def ask(client: Client, options: ChatOptions | None = None) -> str:
    return client.chat(HELLO, options or ChatOptions(), ignore).text


def failure_of(client: Client) -> PacelineError:
    with pytest.raises(PacelineError) as caught:
        ask(client)
    return caught.value


def test_text_arrives_piece_by_piece(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events(["Par", "is."])]
    pieces: list[str] = []
    client.chat(HELLO, ChatOptions(), pieces.append)
    assert pieces == ["Par", "is."]


def test_the_answer_has_the_whole_text(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events(["Par", "is."])]
    assert ask(client) == "Paris."


def test_the_answer_carries_the_servers_metrics(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events(tokens=[1, 2, 3], drafted=4)]
    assert client.chat(HELLO, ChatOptions(), ignore).metrics == Metrics(
        prompt_tokens=12,
        cached_tokens=5,
        completion_tokens=3,
        drafted=4,
        accepted=3,
        steps=2,
        ttft_s=0.25,
        total_s=1.25,
    )


def test_the_answer_carries_the_token_ids(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events(tokens=[9, 8])]
    assert client.chat(HELLO, ChatOptions(), ignore).token_ids == (9, 8)


def test_options_that_are_not_set_are_not_sent(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()]
    ask(client)
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options", "speculation"}


def test_options_that_are_set_are_sent(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()]
    options = ChatOptions("s", speculation=False, temperature=0.0, seed=3, max_tokens=5, return_token_ids=True)
    ask(client, options)
    assert options.body().items() <= server.requests[0].items()


def test_the_model_is_asked_of_the_server(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()]
    ask(client)
    assert server.requests[0]["model"] == "tiny"


def test_an_exception_of_the_reader_ends_the_stream(client: Client, server: FakeServer) -> None:
    def stop(text: str) -> None:
        raise KeyboardInterrupt

    server.answers = [answer_events()]
    with pytest.raises(KeyboardInterrupt):
        client.chat(HELLO, ChatOptions(), stop)


def test_an_error_envelope_becomes_its_class(client: Client, server: FakeServer) -> None:
    server.answers = [refusal(400, "invalid_request_error", "temperature: must be at least 0")]
    assert isinstance(failure_of(client), InvalidRequest)


def test_an_error_envelope_keeps_its_message(client: Client, server: FakeServer) -> None:
    server.answers = [refusal(400, "invalid_request_error", "temperature: must be at least 0")]
    assert failure_of(client).message == "temperature: must be at least 0"


def test_retry_after_is_kept(client: Client, server: FakeServer) -> None:
    server.answers = [refusal(429, Overloaded.code, "queue is full", retry_after="3")]
    assert failure_of(client).retry_after == 3.0


def test_an_error_within_the_stream_is_raised(client: Client, server: FakeServer) -> None:
    server.answers = [[*answer_events()[:2], {"error": {"message": "a step failed", "code": EngineError.code}}]]
    assert failure_of(client).message == "a step failed"


def test_a_stream_that_ends_early_is_an_error(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()[:1]]
    assert "before the answer was complete" in failure_of(client).message


def test_an_error_page_of_a_proxy_shows_its_status(client: Client, server: FakeServer) -> None:
    server.answers = [Refusal(502, b"<html>bad gateway</html>")]
    assert "502 Bad Gateway" in failure_of(client).message


def test_a_server_without_our_numbers_is_named(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()[:-1]]
    assert "not as a Paceline server does" in failure_of(client).message


def test_status_of_another_server_is_named(client: Client, server: FakeServer) -> None:
    server.status = ["something"]
    with pytest.raises(Unavailable, match="not as a Paceline server does"):
        client.status()


def test_an_unreachable_server_names_the_remedy() -> None:
    with Client(f"http://127.0.0.1:{free_ports(1)[0]}") as client, pytest.raises(Unavailable, match="`paceline serve`"):
        client.status()


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    def hang(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("too long")

    far = Client("http://far", transport=httpx.MockTransport(hang))
    with far as client, pytest.raises(Unavailable, match="did not answer in time"):
        client.status()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://a:port", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Client(url)


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, server: FakeServer
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_ports(1)[0]}")
    with Client(server.url) as client:
        assert client.model() == "tiny"


def test_sse_skips_comments_and_other_fields() -> None:
    assert list(sse_events(iter([": ping", "event: x", "", 'data: {"a": 1}', "data: [DONE]", "data: x"]))) == [{"a": 1}]


def test_sse_refuses_what_is_not_json() -> None:
    with pytest.raises(Unavailable, match="not JSON"):
        list(sse_events(iter(["data: {"])))


def test_a_key_is_sent_as_a_bearer_token(server: FakeServer) -> None:
    server.answers = [answer_events()]
    with Client(server.url, api_key="sk-1") as client:
        ask(client)
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer sk-1"


def test_the_key_may_come_from_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.cli.client.secret", {"PACELINE_API_KEY": "sk-2"}.get)
    server.answers = [answer_events()]
    with Client(server.url) as client:
        ask(client)
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer sk-2"


def test_a_key_no_header_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="--api-key: not printable ASCII"):
        Client("http://x", api_key="schlüssel")


@pytest.mark.parametrize(
    ("status", "headers", "remedy"),
    [
        (401, {}, "give a key with --api-key or in PACELINE_API_KEY"),
        (403, {}, "this API key does not allow it; give another one"),
        (429, {}, "try again shortly"),
        (429, {"retry_after": "7"}, "try again in 7 s"),
    ],
)
def test_a_refusal_names_its_remedy(
    client: Client, server: FakeServer, status: int, headers: dict[str, str], remedy: str
) -> None:
    server.answers = [refusal(status, "whatever", "no", **headers)]
    assert failure_of(client).message == f"no; {remedy}"


def test_an_appended_turn_goes_to_the_session(client: Client, server: FakeServer) -> None:
    server.answers = [answer_events()]
    client.chat(HELLO, ChatOptions("a b/c"), ignore, append=True)
    assert server.paths == ["/v1/sessions/a%20b%2Fc/turns"]
    assert "session_id" not in server.requests[0]


def test_what_each_step_brought_is_told(client: Client, server: FakeServer) -> None:
    events = answer_events(["Par"])
    events[1]["paceline"] = {"token_ids": [1, 2, 3], "verified": {"source": "remote", "drafted": 4, "accepted": 2}}
    server.answers = [events]
    steps: list[Step] = []
    client.chat(HELLO, ChatOptions(), ignore, on_step=steps.append)
    assert steps == [Step(3, drafted=4, accepted=2)]


def test_messages_of_a_session_are_read(client: Client, server: FakeServer) -> None:
    server.said = {"a/b": [("user", "hi"), ("assistant", "hello")]}
    assert client.messages("a/b") == [Message("user", "hi"), Message("assistant", "hello")]


def test_an_unknown_session_is_said_so(client: Client) -> None:
    with pytest.raises(UnknownSession):
        client.messages("nobody")
