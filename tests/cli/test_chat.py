from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from paceline.cli.chat import Conversation, interact
from paceline.cli.client import ChatOptions, Client
from tests.cli.conftest import Run
from tests.cli.fakes import FakeServer, answer_events, refusal

Talk = Callable[..., str]


@pytest.fixture
def talk(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Iterator[Talk]:
    """An interactive chat in which the given lines are typed (Ctrl-C is an exception); returns what it prints."""
    with Client(server.url) as client:

        def type_lines(*lines: str | type[BaseException], system: str | None = None) -> str:
            keys = iter([*lines, EOFError])

            def read(prompt: str) -> str:
                key = next(keys)
                if isinstance(key, str):
                    return key
                raise key

            console = Console(width=200, highlight=False)
            interact(Conversation(client, console, ChatOptions(session_id="mine"), system), console, read)
            return capsys.readouterr().out

        yield type_lines


def test_one_question_prints_the_answer_and_its_cost(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events(["Par", "is."])]
    assert run("chat", "Capital?", "--url", server.url).out == (
        "Paris.\ntarget aaa · 5 of 12 prompt tokens cached · 3 tokens · first after 0.25 s · 2.0 tok/s"
        " · 3 of 4 drafted accepted · seed 7\n"
    )


def test_one_question_without_a_session_names_none(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events()]
    run("chat", "hi", "--url", server.url)
    assert "session_id" not in server.requests[0]


def test_options_reach_the_server(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events()]
    options = [
        "--session",
        "s",
        "--temperature",
        "0",
        "--seed",
        "3",
        "--max-tokens",
        "5",
        "--ctx-size",
        "512",
        "--no-speculation",
    ]
    run("chat", "hi", "--url", server.url, *options)
    wanted = {"session_id": "s", "temperature": 0.0, "seed": 3, "max_tokens": 5, "ctx_size": 512, "speculation": False}
    assert wanted.items() <= server.requests[0].items()


def test_the_system_prompt_comes_first(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events()]
    run("chat", "hi", "--url", server.url, "--system", "Be brief.")
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_an_unreachable_server_is_one_line(run: Run) -> None:
    outcome = run("chat", "hi", "--url", "http://127.0.0.1:9")
    assert outcome.err == (
        "error: no server at http://127.0.0.1:9; start one with `paceline serve`, or point --url to it\n"
    )


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events(["\x1b[2Jhi\n"])]
    assert "\x1b" not in run("chat", "hi", "--url", server.url).out


def test_a_follow_up_carries_the_history(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(["Paris."]), answer_events()]
    talk("Capital?", "And its river?")
    assert [message["content"] for message in server.requests[1]["messages"]] == [
        "Capital?",
        "Paris.",
        "And its river?",
    ]


def test_new_forgets_the_history(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    talk("one", "/new", "two", system="Be brief.")
    assert [message["content"] for message in server.requests[1]["messages"]] == ["Be brief.", "two"]


def test_new_opens_another_session(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    talk("one", "/new", "two")
    assert server.requests[0]["session_id"] != server.requests[1]["session_id"]


def test_stats_sum_up_the_session(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    assert "session s: 2 answers · 6 tokens · 10 of 24 prompt tokens cached · 6 of 8 drafted accepted" in talk(
        "one", "two", "/stats"
    )


def test_stats_before_an_answer_say_so(talk: Talk) -> None:
    assert "no answers yet" in talk("/stats")


def test_exit_leaves(talk: Talk, server: FakeServer) -> None:
    talk("/exit", "not sent")
    assert server.requests == []


def test_an_unknown_command_is_not_sent(talk: Talk, server: FakeServer) -> None:
    assert "unknown command /help" in talk("/help")


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk: Talk) -> None:
    assert "Ctrl-D leaves" in talk(KeyboardInterrupt)


def test_an_error_does_not_end_the_chat(talk: Talk, server: FakeServer) -> None:
    server.answers = [refusal(429, "rate_limit_exceeded", "queue is full"), answer_events(["Still here."])]
    assert "Still here." in talk("one", "two")


def test_a_refused_question_leaves_no_trace_in_the_history(talk: Talk, server: FakeServer) -> None:
    server.answers = [refusal(429, "rate_limit_exceeded", "queue is full"), answer_events()]
    talk("one", "two")
    assert [message["content"] for message in server.requests[1]["messages"]] == ["two"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    talk: Talk, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Client, messages: object, options: object, on_text: Callable[[str], None]) -> None:
        on_text("Par")
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "chat", interrupted)
    server.answers = [answer_events()]
    talk("Capital?", "go on")
    assert [message["content"] for message in server.requests[0]["messages"]] == ["Capital?", "Par", "go on"]
