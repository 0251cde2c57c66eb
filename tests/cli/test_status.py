from __future__ import annotations

import json

from tests.cli.conftest import Run
from tests.cli.fakes import DEFAULT_STATUS, FakeServer


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
    assert "rolled back" not in run("status", "--url", server.url).out


def test_what_no_replica_has_to_say_is_no_column(run: Run, server: FakeServer) -> None:
    server.status = with_target(drafter_problems="")
    assert "problems" not in run("status", "--url", server.url).out


def test_replicas_may_report_different_things(run: Run, server: FakeServer) -> None:
    server.status = {**DEFAULT_STATUS, "targets": [{"replica_id": "a", "x": 1}, {"replica_id": "b", "y": 0.5}]}
    assert run("status", "--url", server.url).code == 0


def test_many_replicas_all_have_a_column(run: Run, server: FakeServer) -> None:
    names = [f"replica{number}" for number in range(9)]
    server.status = {**DEFAULT_STATUS, "targets": [{"replica_id": name, "running": 1} for name in names]}
    printed = run("status", "--url", server.url).out
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
