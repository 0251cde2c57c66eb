from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.chat import Chat
from paceline.cli.client import ChatOptions, Client
from paceline.cli.conversation import Conversation
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

            conversation = Conversation(client, ChatOptions(session_id="mine"), system)
            Chat(client, Console(width=200, highlight=False), conversation).interact(read)
            return capsys.readouterr().out

        yield type_lines


def said(server: FakeServer, request: int) -> list[str]:
    return [message["content"] for message in server.requests[request]["messages"]]


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


def test_a_missing_key_is_one_line_with_the_remedy(run: Run, server: FakeServer) -> None:
    server.answers = [refusal(401, "invalid_api_key", "no API key was given")]
    outcome = run("chat", "hi", "--url", server.url)
    assert outcome.err == "error: no API key was given; give a key with --api-key or in PACELINE_API_KEY\n"


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(run: Run, server: FakeServer) -> None:
    server.answers = [answer_events(["\x1b[2Jhi\n"])]
    assert "\x1b" not in run("chat", "hi", "--url", server.url).out


def test_a_stored_session_goes_on_without_being_resent(run: Run, server: FakeServer) -> None:
    server.said = {"trip": [("user", "hi"), ("assistant", "hello")]}
    server.answers = [answer_events()]
    run("chat", "and?", "--url", server.url, "--session", "trip")
    assert (server.paths, said(server, 0)) == (["/v1/sessions/trip/turns"], ["and?"])


def test_a_follow_up_is_appended_to_the_session(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(["Paris."]), answer_events()]
    talk("Capital?", "And its river?")
    assert server.paths == ["/v1/chat/completions", "/v1/sessions/mine/turns"]
    assert said(server, 1) == ["And its river?"]


def test_a_session_the_server_forgot_is_sent_whole(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(["Paris."]), refusal(404, "session_not_found", "gone"), answer_events()]
    talk("Capital?", "And its river?")
    assert said(server, 2) == ["Capital?", "Paris.", "And its river?"]


def test_new_forgets_the_history(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    talk("one", "/new", "two", system="Be brief.")
    assert said(server, 1) == ["Be brief.", "two"]


def test_new_opens_another_session(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    talk("one", "/new", "two")
    assert server.requests[0]["session_id"] != server.requests[1]["session_id"]


def test_a_system_prompt_begins_a_new_session_under_it(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    talk("one", "/system Be brief.", "two")
    assert said(server, 1) == ["Be brief.", "two"]


def test_retry_asks_the_last_question_again(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(["a"]), answer_events(["b"]), answer_events(["c"])]
    talk("one", "two", "/retry")
    assert server.paths[2] == "/v1/chat/completions"
    assert (said(server, 2), server.requests[2]["session_id"]) == (["one", "a", "two"], "mine")


def test_there_is_nothing_to_retry_at_first(talk: Talk) -> None:
    assert "error: nothing to ask again" in talk("/retry")


def test_stats_sum_up_the_session(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), answer_events()]
    assert (
        "session s: 2 answers by aaa · 6 tokens · 2.0 tok/s · first after 0.25 s (median), 0.25 s at most"
        " · 10 of 24 prompt tokens cached · 6 of 8 drafted accepted"
    ) in talk("one", "two", "/stats")


def test_stats_have_a_row_for_each_source(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(sources={"remote": {"drafted": [2, 2], "accepted": [2, 1], "wasted": 5}})]
    (row,) = (line.split() for line in talk("one", "/stats").splitlines() if line.strip().startswith("remote"))
    assert row == ["remote", "4", "3", "1", "5", "75%", "100%", "50%"]


def test_stats_before_an_answer_say_so(talk: Talk) -> None:
    assert "no answers yet" in talk("/stats")


def test_session_says_where_it_is(talk: Talk, server: FakeServer) -> None:
    server.sessions = [
        {
            "session_id": "mine",
            "replica_id": "aaa",
            "cached_tokens": 40,
            "kv_tier": "host",
            "history_tokens": 41,
            "turns": 2,
            "parent": "p",
        }
    ]
    line = "session mine: 40 KV tokens on host of target aaa · 41 tokens in 2 turns · fork of p"
    assert line in talk("/session")


def test_a_session_nobody_knows_yet_is_new(talk: Talk) -> None:
    assert "session mine: new" in talk("/session")


def test_session_with_a_name_goes_on_there(talk: Talk, server: FakeServer) -> None:
    server.said = {"trip": [("user", "hi"), ("assistant", "hello, you")]}
    server.answers = [answer_events()]
    assert "session trip, 2 messages\nhello, you\n" in talk("/session trip", "and?")
    assert server.paths == ["/v1/sessions/trip/turns"]


def test_a_session_that_does_not_exist_changes_nothing(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events()]
    assert "error: nobody holds nobody" in talk("/session nobody", "hi")
    assert server.requests[0]["session_id"] == "mine"


def test_fork_goes_on_in_the_fork_and_back_returns(talk: Talk, server: FakeServer) -> None:
    server.said = {"mine": [("user", "one"), ("assistant", "Paris.")]}
    server.answers = [answer_events(), answer_events(), answer_events()]
    assert "session forked, a fork of mine" in talk("one", "/fork forked", "two", "/session back", "three")
    assert [path for path in server.paths if path.startswith("/v1/sessions")] == [
        "/v1/sessions/mine/fork",
        "/v1/sessions/forked/turns",
        "/v1/sessions/mine/turns",
    ]


def test_a_fork_needs_an_answer(talk: Talk, server: FakeServer) -> None:
    assert "error: nothing to fork" in talk("/fork")


def test_save_writes_what_was_said(talk: Talk, server: FakeServer, tmp_path: Path) -> None:
    server.answers = [answer_events(["Paris."])]
    talk("Capital?", f"/save {tmp_path / 'talk.md'}")
    assert (tmp_path / "talk.md").read_text() == "**user**\n\nCapital?\n\n**assistant**\n\nParis.\n"


def test_save_overwrites_nothing(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "talk.md").write_text("mine")
    assert "File exists" in talk(f"/save {tmp_path / 'talk.md'}")


def test_help_lists_every_command(talk: Talk) -> None:
    printed = talk("/help")
    names = ["/session", "/stats", "/fork", "/retry", "/new", "/system", "/save", "/help", "/exit"]
    assert [name for name in names if name not in printed] == []


def test_exit_leaves(talk: Talk, server: FakeServer) -> None:
    talk("/exit", "not sent")
    assert server.requests == []


def test_an_unknown_command_is_not_sent(talk: Talk, server: FakeServer) -> None:
    assert "unknown command /what; /help lists them" in talk("/what")
    assert server.requests == []


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk: Talk) -> None:
    assert "Ctrl-D leaves" in talk(KeyboardInterrupt)


def test_an_error_does_not_end_the_chat(talk: Talk, server: FakeServer) -> None:
    server.answers = [refusal(429, "rate_limit_exceeded", "queue is full"), answer_events(["Still here."])]
    assert "Still here." in talk("one", "two")


def test_a_refused_question_leaves_no_trace_in_the_history(talk: Talk, server: FakeServer) -> None:
    server.answers = [refusal(429, "rate_limit_exceeded", "queue is full"), answer_events()]
    talk("one", "two")
    assert said(server, 1) == ["two"]


def test_a_refused_follow_up_is_still_appended_the_next_time(talk: Talk, server: FakeServer) -> None:
    server.answers = [answer_events(), refusal(429, "rate_limit_exceeded", "queue is full"), answer_events()]
    talk("one", "two", "three")
    assert (server.paths[2], said(server, 2)) == ("/v1/sessions/mine/turns", ["three"])


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    talk: Talk, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(
        self: Client, messages: object, options: object, on_text: Callable[[str], None], **_: object
    ) -> None:
        on_text("Par")
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "chat", interrupted)
    server.answers = [answer_events()]
    assert "stopped" in talk("Capital?", "go on")
    assert said(server, 0) == ["Capital?", "Par", "go on"]
