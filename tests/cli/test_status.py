from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from paceline.cli.client import Client
from paceline.cli.status import keep_showing, print_json
from paceline.cli.status_view import ago
from paceline.errors import PacelineError, Unavailable
from tests.cli.conftest import Run
from tests.cli.fakes import DEFAULT_STATUS, FakeServer


def card(name: str, updated: float, **values: object) -> dict[str, object]:
    return {"session_id": name, "replica_id": "aaa", "cached_tokens": 7, "running": False, "updated": updated, **values}


def with_target(**values: object) -> dict[str, object]:
    return {**DEFAULT_STATUS, "targets": [{"replica_id": "t", **values}]}


def test_json_is_what_the_server_says(run: Run, server: FakeServer) -> None:
    assert json.loads(run("status", "--url", server.url, "--json").out) == DEFAULT_STATUS


def test_the_table_names_every_replica(run: Run, server: FakeServer) -> None:
    printed = run("status", "--url", server.url).out
    assert all(name in printed for name in ("aaa", "bbb", "10.0.0.1:7"))


def test_nothing_to_warn_of_is_no_warning(run: Run, server: FakeServer) -> None:
    server.status = with_target(warnings=[])
    assert "WARNING" not in run("status", "--url", server.url).out


def test_what_a_target_warns_of_is_printed_with_its_name(run: Run, server: FakeServer) -> None:
    server.status = with_target(warnings=["speculation is on, but idle"])
    assert "WARNING: speculation is on, but idle [t]" in run("status", "--url", server.url).out


def test_what_several_targets_warn_of_is_printed_once(run: Run, server: FakeServer) -> None:
    targets = [{"replica_id": name, "warnings": ["idle"]} for name in ("a", "b")]
    server.status = {**DEFAULT_STATUS, "targets": targets}
    assert "WARNING: idle [a, b]" in run("status", "--url", server.url).out


SPECULATION = {
    "verification": "coupled",
    "sources": {
        "remote": {"drafted": [10, 8], "accepted": [9, 4], "wasted": 7},
        "prompt_lookup": {"drafted": [4], "accepted": [1]},
    },
    "late": 6,
}


def words(printed: str, first: str) -> list[str]:
    """Of the line that begins with a word."""
    return next(line.split() for line in printed.splitlines() if line.strip().startswith(first))


def test_each_source_has_a_row(run: Run, server: FakeServer) -> None:
    server.status = with_target(speculation=SPECULATION)
    printed = run("status", "--url", server.url).out
    assert words(printed, "remote") == ["remote", "18", "13", "5", "7", "72%", "90%", "50%"]
    assert words(printed, "prompt") == ["prompt", "lookup", "4", "1", "3", "0", "25%", "25%"]


def test_sources_are_summed_over_targets(run: Run, server: FakeServer) -> None:
    targets = [{"replica_id": name, "speculation": SPECULATION} for name in ("a", "b")]
    server.status = {**DEFAULT_STATUS, "targets": targets}
    assert words(run("status", "--url", server.url).out, "remote")[1:3] == ["36", "26"]


def test_late_drafts_and_connected_drafters_are_told(run: Run, server: FakeServer) -> None:
    server.status = with_target(speculation=SPECULATION, drafters_known=2, drafters_connected=1)
    printed = run("status", "--url", server.url).out
    assert "speculation (coupled): 6 late; drafters connected to each target: 1 of 2" in printed


def test_without_candidates_there_is_no_table_of_sources(run: Run, server: FakeServer) -> None:
    server.status = with_target(speculation={**SPECULATION, "sources": {}})
    assert "by place in the run" not in run("status", "--url", server.url).out


def test_all_shows_everything_a_replica_reports(run: Run, server: FakeServer) -> None:
    server.status = with_target(kv_restores_late=3)
    assert words(run("status", "--url", server.url, "--all").out, "kv") == ["kv", "restores", "late", "3"]


def test_what_no_replica_has_to_say_is_no_row(run: Run, server: FakeServer) -> None:
    server.status = with_target(drafter_problems="")
    assert "problems" not in run("status", "--url", server.url, "--all").out


def test_replicas_may_report_different_things(run: Run, server: FakeServer) -> None:
    server.status = {**DEFAULT_STATUS, "targets": [{"replica_id": "a", "x": 1}, {"replica_id": "b", "y": 0.5}]}
    assert run("status", "--url", server.url).code == 0


def test_many_replicas_are_all_shown(run: Run, server: FakeServer) -> None:
    names = [f"replica{number}" for number in range(9)]
    server.status = {**DEFAULT_STATUS, "targets": [{"replica_id": name, "running": 1} for name in names]}
    for flags in ((), ("--all",)):
        printed = run("status", "--url", server.url, *flags).out
        assert [name for name in names if name not in printed] == []


def test_an_unreachable_server_exits_with_1(run: Run) -> None:
    assert run("status", "--url", "http://127.0.0.1:9").code == 1


RANKS = [
    {"rank": 0, "pid": 7, "node": "10.0.0.1", "cores": [0, 1, 2, 3, 8, 9]},
    {"rank": 1, "pid": 8, "node": "10.0.0.1", "cores": [4]},
]


def test_the_ranks_of_a_replica_have_a_line(run: Run, server: FakeServer) -> None:
    server.status = with_target(tensor_parallel_size=2, ranks=RANKS)
    printed = run("status", "--url", server.url).out
    assert "ranks of t: 0: process 7 on 10.0.0.1, cores 0-3,8-9; 1: process 8 on 10.0.0.1, core 4" in printed


def test_a_replica_of_one_rank_has_none(run: Run, server: FakeServer) -> None:
    server.status = with_target(tensor_parallel_size=1)
    printed = run("status", "--url", server.url).out
    assert "rank" not in printed and "tensor" not in printed


def test_a_target_has_its_load_and_its_kv_on_one_line(run: Run, server: FakeServer) -> None:
    kv = {"kv_tokens_total": 1000, "kv_tokens_in_use": 100, "kv_tokens_cached": 400}
    server.status = with_target(running=2, waiting=1, drafted_tokens=10, accepted_tokens=6, **kv)
    found = words(run("status", "--url", server.url).out, "t ")
    assert (found[1:3], found[4], found[-3:]) == (["2", "1"], "50%", ["10", "6", "60%"])


def test_sessions_are_listed_by_their_last_use(run: Run, server: FakeServer) -> None:
    server.sessions = [card("older", 10.0), card("newer", 20.0, kv_tier="disk", turns=3)]
    printed = run("status", "--url", server.url).out
    assert printed.index("newer") < printed.index("older")
    assert words(printed, "newer")[:5] == ["newer", "aaa", "disk", "7", "-"]


def test_of_many_sessions_the_latest_are_shown_and_the_others_counted(run: Run, server: FakeServer) -> None:
    server.sessions = [card(f"session{number:02}", float(number)) for number in range(1, 16)]
    printed = run("status", "--url", server.url).out
    assert ("session15" in printed, "session05" in printed, "and 5 more" in printed) == (True, False, True)


def test_a_time_is_told_in_its_largest_unit() -> None:
    assert [ago(1000.0 - gone, 1000.0) for gone in (0, 59, 60, 7200 - 6201)] == [
        "0 s ago",
        "59 s ago",
        "1 min ago",
        "16 min ago",
    ]
    assert (ago(None, 5.0), ago(1.0, 1.0 + 2 * 86400)) == ("-", "2 d ago")


class Rounds:
    """Stands for `time.sleep`: Ctrl-C after so many."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, seconds: float) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_watching_draws_until_ctrl_c() -> None:
    seen = iter(["first", "second", "never"])
    written = StringIO()
    keep_showing(Console(file=written), lambda: next(seen), 1.0, Rounds(2))
    assert written.getvalue() == "first\nsecond\n"


def test_watching_goes_on_when_the_server_does_not_answer() -> None:
    answers: Iterator[str | PacelineError] = iter([Unavailable("no server at X"), "well again"])

    def look() -> str:
        found = next(answers)
        if isinstance(found, PacelineError):
            raise found
        return found

    written = StringIO()
    keep_showing(Console(file=written), look, 1.0, Rounds(2))
    assert written.getvalue() == "no server at X\nasking again in 1 s; Ctrl-C ends\nwell again\n"


def test_a_terminal_is_drawn_over_and_left_as_it_was() -> None:
    written = StringIO()
    keep_showing(Console(file=written, force_terminal=True), lambda: "all is well", 1.0, Rounds(1))
    enter, leave = "\x1b[?1049h", "\x1b[?1049l"
    assert written.getvalue().startswith(enter) and leave in written.getvalue()
    assert "all is well" in written.getvalue()


def test_watched_json_is_a_line_each_time(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(server.url) as client:
        print_json(client, 1.0, Rounds(2))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [DEFAULT_STATUS] * 2


SCALED = {
    "enabled": True,
    "target": {"wanted": 3, "reason": "seats", "text": "5 of 4 seats in use: 3"},
    "draft": {"wanted": 1},
    "waiting": ["1 of 3 target replicas run, and one more needs 9 CPUs"],
    "errors": 2,
    "error": "ValueError: no",
}


@pytest.mark.parametrize(
    "line",
    [
        "autoscaling targets: 3 wanted, seats: 5 of 4 seats in use: 3",
        "WARNING: 1 of 3 target replicas run, and one more needs 9 CPUs",
        "autoscaling: the policy failed 2 times, last with ValueError: no",
    ],
)
def test_what_the_autoscaler_says_is_printed(run: Run, server: FakeServer, line: str) -> None:
    server.status = {**DEFAULT_STATUS, "autoscaling": SCALED}
    assert line in " ".join(run("status", "--url", server.url).out.split())


def test_without_an_autoscaler_nothing_is_said_of_it(run: Run, server: FakeServer) -> None:
    server.status = {**DEFAULT_STATUS, "autoscaling": {"enabled": False, "target": {"wanted": 2}}}
    assert "autoscaling" not in run("status", "--url", server.url).out
