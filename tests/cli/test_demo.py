from __future__ import annotations

import socket
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.client import Answer
from paceline.cli.demo import SPEED_QUESTIONS, SPEED_ROUNDS, Turn, first_difference, speed_note, turn_table
from paceline.config import AppSettings, default_deployment
from paceline.types import Metrics
from tests.cli.conftest import Outcome, Run
from tests.cli.fakes import DEFAULT_STATUS, FakeCluster, FakeServer, answer_events, refusal


def good_answers() -> list[list[dict[str, object]]]:
    """Two turns with drafts, then the same two without, then the rounds that measure the speed."""
    first, second = [1, 2, 3], [4, 5]
    return [
        answer_events(["Paris."], tokens=first),
        answer_events(["Its tower."], tokens=second),
        answer_events(["Paris."], tokens=first, drafted=0),
        answer_events(["Its tower."], tokens=second, drafted=0),
        *speed_answers(),
    ]


def speed_answers() -> list[list[dict[str, object]]]:
    """10 tokens a second with drafts, 5 without, beside a round that does not count."""
    found = []
    for number in range(SPEED_ROUNDS + 1):
        for total_s in (1.25, 2.25):
            each = answer_events(tokens=range(11), total_s=total_s if number else 9.0)
            found += [each] * len(SPEED_QUESTIONS)
    return found


@pytest.fixture
def shown(run: Run, cluster: FakeCluster, server: FakeServer) -> Outcome:
    server.answers = [*good_answers()]
    return run("demo")


def test_it_ends_with_0(shown: Outcome) -> None:
    assert shown.code == 0


def test_it_stops_the_cluster(shown: Outcome, cluster: FakeCluster) -> None:
    assert cluster.stopped == 1


def test_it_prints_the_answers(shown: Outcome) -> None:
    assert "> What is the capital of France?\nParis.\n" in shown.out


def test_it_says_that_the_tokens_are_the_same(shown: Outcome) -> None:
    assert "Same tokens with and without drafts: yes, all 5" in shown.out


def test_the_table_has_a_row_for_each_turn_and_mode(shown: Outcome) -> None:
    assert [row[:2] for row in table_rows(shown)] == [["1", "on"], ["2", "on"], ["1", "off"], ["2", "off"]]


def test_a_row_has_the_numbers_of_its_turn(shown: Outcome) -> None:
    assert table_rows(shown)[0][2:] == ["aaa", "12", "5", "3", "0.25", "s", "2.0", "4", "3", "0"]


def test_the_table_fits_in_80_columns() -> None:
    metrics = Metrics(4096, 4000, 1000, 4000, 3000, 100, 1000, 0.0, 10.25, 20.0)
    turn = Turn(1, True, Answer("", "stop", "q7x2m9ab", "s", 1, metrics))
    assert Console(width=200).measure(turn_table([turn])).maximum <= 80


def test_it_says_what_the_numbers_do_not_show(shown: Outcome) -> None:
    assert "Drafts run smollm2-135m-draft, targets smollm2-135m." in shown.out


def test_it_says_how_fast_one_stream_is_with_and_without_drafts(shown: Outcome) -> None:
    assert "10 tok/s with drafts, 5 without: 2.00x (with 10-10, without 5-5)" in shown.out


def test_drafts_of_the_targets_own_model_are_called_that() -> None:
    note = "The drafts run the target's own model (smollm2-135m): this shows the path, not the speed."
    assert speed_note(AppSettings()).startswith(note)


def test_the_turns_of_a_round_share_a_session(shown: Outcome, server: FakeServer) -> None:
    sessions = [request["session_id"] for request in server.requests[:4]]
    assert (sessions[0] == sessions[1], sessions[2] == sessions[3], sessions[0] == sessions[2]) == (True, True, False)


def test_the_second_round_is_without_speculation(shown: Outcome, server: FakeServer) -> None:
    assert [request["speculation"] for request in server.requests[:4]] == [True, True, False, False]


def test_the_answers_are_greedy(shown: Outcome, server: FakeServer) -> None:
    assert {request["temperature"] for request in server.requests} == {0.0}


def test_the_follow_up_carries_the_first_answer(shown: Outcome, server: FakeServer) -> None:
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "Paris."}


def test_its_models_are_made_ready(shown: Outcome, resolved: list[str]) -> None:
    assert resolved == ["smollm2-135m", "smollm2-135m-draft"]


def test_it_takes_free_ports(shown: Outcome, cluster: FakeCluster) -> None:
    assert cluster.deployment is not None
    used = (cluster.deployment["http_options"]["port"], cluster.deployment["grpc_options"]["port"])
    assert not {8000, 9000}.intersection(used)


def test_it_deploys_local_cpu(shown: Outcome, cluster: FakeCluster) -> None:
    assert cluster.deployment is not None
    assert cluster.deployment["applications"][0]["args"]["target"] == {
        "num_replicas": 2,
        "num_cpus": 0.25,
        "host": "127.0.0.1",
    }


def test_without_local_cpu_it_deploys_the_default(
    run: Run, cluster: FakeCluster, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.cli.deployment.LOCAL_CPU", Path("nowhere.yaml"))
    server.answers = [*good_answers()]
    run("demo")
    assert cluster.deployment is not None
    assert cluster.deployment["applications"][0]["args"] == default_deployment()["applications"][0]["args"]


def test_a_given_port_that_is_taken_is_an_error(run: Run, cluster: FakeCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"port {port} (http_options.port): already in use" in run("demo", "--port", str(port)).err


def test_different_tokens_are_stated(run: Run, cluster: FakeCluster, server: FakeServer) -> None:
    server.answers = [*good_answers()[:3], answer_events(tokens=[4, 6], drafted=0), *speed_answers()]
    assert "Same tokens with and without drafts: NO, turn 2 differs from token 2 on." in run("demo").out


def test_a_failed_request_exits_with_1(run: Run, cluster: FakeCluster, server: FakeServer) -> None:
    server.answers = [refusal(500, "internal_error", "a step failed")]
    assert run("demo").code == 1


def test_a_failed_request_is_cleaned_up(run: Run, cluster: FakeCluster, server: FakeServer) -> None:
    server.answers = [refusal(500, "internal_error", "a step failed")]
    run("demo")
    assert cluster.stopped == 1


def test_candidates_that_never_arrive_are_an_error(run: Run, cluster: FakeCluster, server: FakeServer) -> None:
    server.answers = [answer_events(drafted=0)] * 4
    assert "not one candidate reached a target" in run("demo").err


def test_candidates_that_never_arrive_are_cleaned_up(run: Run, cluster: FakeCluster, server: FakeServer) -> None:
    server.answers = [answer_events(drafted=0)] * 4
    run("demo")
    assert cluster.stopped == 1


def test_drafts_that_do_not_connect_are_stated(
    run: Run, cluster: FakeCluster, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.cli.demo.DRAFTS_TIMEOUT_S", -1.0)
    server.status = {**DEFAULT_STATUS, "targets": [{"replica_id": "t", "drafters_known": 0, "drafters_connected": 0}]}
    server.answers = [*good_answers()]
    assert "WARNING: speculation is on, but no drafter is connected to t" in run("demo").out


def test_keep_waits_for_ctrl_c_before_it_stops(
    run: Run, cluster: FakeCluster, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[int] = []
    monkeypatch.setattr("paceline.cli.cluster.wait_for_interrupt", lambda: stopped.append(cluster.stopped))
    server.answers = [*good_answers()]
    run("demo", "--keep")
    assert stopped == [0]


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((), (1,), 0), ((), (), None)],
)
def test_first_difference(left: tuple[int, ...], right: tuple[int, ...], place: int | None) -> None:
    assert first_difference(left, right) == place


def table_rows(outcome: Outcome) -> list[list[str]]:
    """The words of the table's rows."""
    rows = [line.split() for line in outcome.out.splitlines()]
    return [row for row in rows if row[1:2] in (["on"], ["off"])]
