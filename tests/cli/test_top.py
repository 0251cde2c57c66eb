from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from paceline.cli.client import ServerStatus
from paceline.cli.scrape import Interval, Scrape
from paceline.cli.top_view import Look, view
from tests.cli.conftest import Run
from tests.cli.fakes import DEFAULT_STATUS, MODEL, FakeServer

NOW = 1_000_000.0
TARGET = {"replica_id": "aaa", "running": 3, "waiting": 1, "kv_tokens_total": 100, "kv_tokens_in_use": 50}
DRAFT = {"replica_id": "bbb", "sequences": 3, "streams": 1}


def told(tokens: int, busy: float, drafted: int, accepted: int, fast: int = 0) -> str:
    return (
        f'vllm:generation_tokens_total{{replica="aaa"}} {tokens}\n'
        f'vllm:spec_decode_num_draft_tokens_total{{replica="aaa"}} {drafted}\n'
        f'vllm:spec_decode_num_accepted_tokens_total{{replica="aaa"}} {accepted}\n'
        f'vllm:time_to_first_token_seconds_bucket{{replica="aaa",le="0.5"}} {fast}\n'
        f'vllm:time_to_first_token_seconds_bucket{{replica="aaa",le="+Inf"}} {fast}\n'
        f'paceline_drafter_busy_seconds_total{{replica="bbb"}} {busy}\n'
    )


BEFORE, AFTER = told(100, 5.0, 40, 20), told(300, 6.0, 140, 90, fast=10)


def look(
    targets: list[dict[str, Any]] | None = None, drafts: list[dict[str, Any]] | None = None, **raw: object
) -> Look:
    targets, drafts = [TARGET] if targets is None else targets, [DRAFT] if drafts is None else drafts
    status = ServerStatus(MODEL, tuple(targets), tuple(drafts), raw)
    interval = Interval(Scrape.read(BEFORE, 0.0), Scrape.read(AFTER, 2.0))
    return Look(status, interval, "http://here", NOW)


def printed(seen: Look, columns: int = 140, rows: int = 40) -> str:
    console = Console(file=StringIO(), width=columns, height=rows, highlight=False)
    console.print(view(seen, columns, rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


def line(text: str, first: str) -> list[str]:
    return next(each.split() for each in text.splitlines() if each.startswith(first))


def test_a_target_has_its_rates_in_its_row() -> None:
    assert line(printed(look()), "aaa")[1:8] == ["3", "1", "━━━━━─────", "50%", "100", "475", "ms"]


def test_a_drafter_has_its_load_in_its_row() -> None:
    assert line(printed(look()), "bbb")[1] == "50%"


def test_the_totals_are_in_one_line() -> None:
    found = printed(look())
    assert "running 3, waiting 1 · 100 tok/s out" in found
    assert "TTFT p50 250 ms, p95 475 ms" in found
    assert "accepted 70%" in found


def test_what_a_server_does_not_tell_is_a_dash() -> None:
    assert "ITL p50 -, p95 - · " in printed(look())


def test_a_server_that_does_not_scale_itself_has_no_decisions() -> None:
    assert "→" not in printed(look())


DECISIONS = [
    {"time": NOW - 300, "pool": "target", "before": 1, "replicas": 2, "reason": "seats", "text": "9 of 8 seats"},
    {"time": NOW - 5, "pool": "draft", "before": 2, "replicas": 1, "reason": "gain", "text": "saves 0.1 of 0.25"},
]


def test_decisions_are_told_with_their_reasons_the_latest_first() -> None:
    found = [each for each in printed(look(autoscaling={"decisions": DECISIONS})).splitlines() if "→" in each]
    assert found == [
        "   5 s ago  draft 2 → 1  gain: saves 0.1 of 0.25",
        " 5 min ago  target 1 → 2  seats: 9 of 8 seats",
    ]


def test_replicas_that_are_wanted_and_not_there_are_told() -> None:
    scaling = {"target": {"wanted": 3, "reason": "seats"}, "draft": {"wanted": 1}}
    assert "targets: 1 of 3, drafts: 1, over" in printed(look(autoscaling=scaling))


def many(count: int) -> list[dict[str, Any]]:
    return [{"replica_id": f"t{number:02}", "running": number} for number in range(count)]


def test_the_busiest_replicas_come_first_and_the_others_are_counted() -> None:
    found = printed(look(many(30)), rows=20)
    assert line(found, "t29")[1] == "29"
    assert "t00" not in found and "and 21 more" in found


@pytest.mark.parametrize("rows", [13, 16, 24, 50])
def test_the_picture_fits_into_the_rows(rows: int) -> None:
    found = printed(look(many(30), [DRAFT] * 5, autoscaling={"decisions": DECISIONS * 9}), rows=rows)
    assert len(found.splitlines()) <= rows


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_the_picture_fits_into_the_columns(columns: int) -> None:
    found = printed(look(autoscaling={"decisions": DECISIONS}), columns=columns)
    assert max(len(each) for each in found.splitlines()) <= columns


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_a_row_stays_one_line(columns: int) -> None:
    found = printed(look(many(3), [DRAFT]), columns=columns).splitlines()
    assert len(found) == 3 + 3 + 3 + 3 + 1


def test_once_prints_what_lies_between_two_looks(run: Run, server: FakeServer) -> None:
    server.status = {**DEFAULT_STATUS, "targets": [TARGET], "drafts": [DRAFT]}
    server.metrics = [BEFORE, AFTER]
    outcome = run("top", "--once", "--every", "0.2", "--url", server.url)
    assert outcome.code == 0
    assert "accepted 70%" in outcome.out


def test_an_unreachable_server_exits_with_1(run: Run) -> None:
    assert run("top", "--once", "--url", "http://127.0.0.1:9").code == 1
