"""What a conversation is recognized by, and what a session keeps of functions and responses."""

from __future__ import annotations

from dataclasses import replace

from paceline.sessions.history import ChatMessage, Session, ToolCall, turn_key

CALL = ToolCall("c1", "weather", '{"city": "Oslo", "days": 2}')
SAID = (
    ChatMessage("user", "Weather?"),
    ChatMessage("assistant", "See.", tool_calls=(CALL,)),
    ChatMessage("tool", "rain", tool_call_id="c1"),
)


def key(call: ToolCall = CALL, content: str = "See.", call_id: str | None = "c1") -> str:
    asked, answer, result = SAID
    answer = replace(answer, content=content, tool_calls=(call,))
    return turn_key("m", (asked, answer, replace(result, tool_call_id=call_id)))


def test_what_clients_change_about_a_call_does_not_count() -> None:
    respaced = replace(CALL, arguments='{"days":2,"city":"Oslo"}')
    assert key() == key(respaced) == key(content=" See.\n") == key(replace(CALL, call_id="other"), call_id="other")


def test_another_call_is_another_conversation() -> None:
    others = [replace(CALL, name="clock"), replace(CALL, arguments='{"city": "Rome"}'), replace(CALL, arguments="{")]
    assert len({key(), *map(key, others)}) == 4


def test_functions_instructions_and_responses_survive_being_stored() -> None:
    session = Session("s", (1, 2), SAID, tools="[]", instructions="Be kind.", responses={"resp_1": "{}"})
    assert Session.from_json(session.to_json()) == session


def test_a_session_stored_before_there_were_functions_is_read() -> None:
    stored = Session("s", (1,), SAID[:1]).to_json()
    for name in ("tools", "instructions"):
        stored = stored.replace(f'"{name}": "", ', "")
    assert '"tools"' not in stored
    assert Session.from_json(stored.replace(', "responses": {}', "")) == Session("s", (1,), SAID[:1])
