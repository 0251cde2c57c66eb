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


def test_connected_drafters_give_no_warning(run: Run, server: FakeServer) -> None:
    assert "WARNING" not in run("status", "--url", server.url).out


def test_a_target_that_wants_drafters_and_has_none_is_named(run: Run, server: FakeServer) -> None:
    server.status = with_target(drafters_known=0, drafters_connected=0)
    printed = run("status", "--url", server.url).out
    assert "WARNING: speculation is on, but no drafter is connected to t: answers are right, and slower" in printed


def test_the_reason_a_target_gives_is_passed_on(run: Run, server: FakeServer) -> None:
    server.status = with_target(drafters_known=1, drafters_connected=0, drafter_problems="d: another tokenizer")
    assert "connected to t (d: another tokenizer)" in run("status", "--url", server.url).out


def test_a_target_that_does_not_speculate_gives_no_warning(run: Run, server: FakeServer) -> None:
    server.status = with_target(drafters_connected=0)
    assert "WARNING" not in run("status", "--url", server.url).out


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
