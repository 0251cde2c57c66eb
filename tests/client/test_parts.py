"""What both clients are made of: repetitions, the connection, requests; and what is imported for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paceline.client
from paceline.client import TLS, Retry
from paceline.client.answers import Collected
from paceline.client.connection import Connection, is_local
from paceline.client.options import Sampling, chat_request
from paceline.client.retry import Attempts
from paceline.errors import ConfigError, InvalidRequest, Overloaded, RequestTimeout, Unavailable
from paceline.sessions.history import ToolCall
from paceline.types import Grammar, SamplingParams
from paceline.v1 import inference_pb2 as pb

USUAL = Retry()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def attempts(retry: Retry = USUAL, timeout_s: float = 100.0, clock: Clock | None = None, draw: float = 1.0) -> Attempts:
    return Attempts(retry, timeout_s, clock=clock or Clock(), draw=lambda: draw)


def test_pauses_grow_up_to_the_longest() -> None:
    made, pauses = attempts(Retry(5, first_s=1.0, longest_s=3.0)), []
    for _ in range(5):
        made.begin()
        pauses.append(made.pause_after(Unavailable("gone")))
    assert pauses == [1.0, 2.0, 3.0, 3.0, None]


def test_a_pause_is_drawn() -> None:
    made = attempts(Retry(first_s=1.0), draw=0.25)
    made.begin()
    assert made.pause_after(Unavailable("gone")) == 0.25


def test_the_server_s_pause_is_kept() -> None:
    made = attempts(Retry(first_s=1.0), draw=0.0)
    made.begin()
    assert made.pause_after(Overloaded("full", retry_after=7.0)) == 7.0


def test_a_pause_beyond_the_limit_is_not_begun() -> None:
    made = attempts(timeout_s=5.0)
    made.begin()
    assert made.pause_after(Overloaded("full", retry_after=5.0)) is None


def test_only_a_refusal_allows_a_call_to_be_repeated_that_changes_something() -> None:
    made = attempts(draw=0.0)
    made.begin()
    assert made.pause_after(Unavailable("gone"), harmless=False) is None
    assert made.pause_after(Overloaded("full"), harmless=False) == 0.0


def test_no_attempt_begins_after_the_limit() -> None:
    clock = Clock()
    made = attempts(timeout_s=5.0, clock=clock)
    assert made.begin() == 5.0
    clock.now = 5.0
    with pytest.raises(RequestTimeout, match="within 5 s"):
        made.begin()


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.2:1", "[::1]:1", "unix:/tmp/x", "dns:///localhost:1"])
def test_a_key_may_be_sent_in_plain_text_within_this_machine(address: str) -> None:
    assert is_local(address)
    assert ("authorization", "Bearer k") in Connection(address, "k", None, ()).headers


@pytest.mark.parametrize("address", ["example.org:9000", "10.0.0.7:9000", "dns:///server:9000"])
def test_a_key_is_not_sent_over_a_network_in_plain_text(address: str) -> None:
    with pytest.raises(ConfigError, match="api_key: would be sent to"):
        Connection(address, "k", None, ())
    assert Connection(address, "k", TLS(), ()).credentials is not None
    assert Connection(address, "k", None, (), plaintext_key=True).credentials is None


def test_a_connection_does_not_show_its_key() -> None:
    assert "secret" not in repr(Connection("localhost:1", "secret", None, ()))


def test_every_sampling_parameter_is_an_option() -> None:
    # `shown_token_ids` is for the server to say.
    assert set(Sampling.__annotations__) == set(SamplingParams.__dataclass_fields__) - {"shown_token_ids"}
    assert set(Sampling.__annotations__) == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}


def test_tools_are_in_openai_s_form() -> None:
    function = {"name": "f", "description": "does f", "parameters": {"type": "object"}, "strict": True}
    asked = {"tools": [{"type": "function", "function": function}], "tool_choice": "f", "parallel_tool_calls": False}
    request = chat_request("hi", asked)
    tool = pb.Tool(name="f", description="does f", parameters_json_schema='{"type": "object"}', strict=True)
    assert list(request.tools) == [tool]
    assert (request.tool_choice, request.parallel_tool_calls) == (pb.ToolChoice(function="f"), False)
    assert chat_request("hi", {"tool_choice": "required"}).tool_choice.mode == pb.ToolChoice.MODE_REQUIRED


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="missing field 'name'"):
        chat_request("hi", {"tools": [{"type": "function", "function": {}}]})


def test_calls_and_their_answers_are_messages() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    request = chat_request([asked, {"role": "tool", "content": "4", "tool_call_id": "1"}], {})
    assert list(request.messages) == [
        pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="1", name="f", arguments="{}")]),
        pb.Message(role="tool", content="4", tool_call_id="1"),
    ]


def test_a_grammar_is_sent_by_its_kind() -> None:
    request = chat_request("hi", {"grammar": Grammar("json_schema", "{}")})
    assert request.sampling.grammar == pb.Grammar(json_schema="{}")


def test_pieces_of_tool_calls_are_put_together() -> None:
    collected = Collected()
    for event in (
        pb.GenerateEvent(started=pb.Started(request_id="r")),
        pb.GenerateEvent(tool_call=pb.ToolCallDelta(call=1, id="b", name="g", arguments="{}")),
        pb.GenerateEvent(tool_call=pb.ToolCallDelta(id="a", name="f")),
        pb.GenerateEvent(tool_call=pb.ToolCallDelta(arguments='{"x"')),
        pb.GenerateEvent(tool_call=pb.ToolCallDelta(arguments=": 1}")),
        pb.GenerateEvent(finished=pb.Finished(reason=pb.FINISH_REASON_STOP)),
    ):
        collected.add(event)
    assert collected.answer().tool_calls == (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{}"))


def test_events_that_end_early_are_no_answer() -> None:
    collected = Collected()
    collected.add(pb.GenerateEvent(started=pb.Started(request_id="r")))
    with pytest.raises(Unavailable, match="before it was complete"):
        collected.answer()


def test_an_event_of_a_newer_server_is_ignored() -> None:
    assert Collected().add(pb.GenerateEvent()) is None


def test_the_client_needs_neither_ray_nor_torch() -> None:
    heavy = {"ray", "torch", "transformers", "fastapi", "jinja2"}
    code = f"import sys, paceline.client; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_the_public_names_are_there() -> None:
    assert all(hasattr(paceline.client, name) for name in paceline.client.__all__)
    assert sorted(paceline.client.__all__, key=str.lower) == sorted(set(paceline.client.__all__), key=str.lower)
