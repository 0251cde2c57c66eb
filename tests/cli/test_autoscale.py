"""`paceline autoscale simulate`, from a line to tables, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.autoscaling.simulate.cluster import Simulation
from tests.cli.conftest import Run

SMALL = ("--hours", "0.05", "--tick", "2", "--rate", "20")


def report(run: Run, *arguments: str) -> dict[str, Any]:
    outcome = run("autoscale", "simulate", *arguments, *SMALL, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_policies_are_compared(run: Run) -> None:
    found = report(run, "poisson", "--policy", "throughput", "--policy", "fixed:3")["traces"][0]
    assert [each["policy"] for each in found["policies"]] == ["throughput", "fixed:3"]


def test_a_fixed_number_costs_that_many(run: Run) -> None:
    found = report(run, "poisson", "--policy", "fixed:3")["traces"][0]["policies"][0]
    assert found["cost"] == pytest.approx(3 * 0.05)


def test_every_request_is_in_the_report(run: Run) -> None:
    found = report(run, "poisson", "--policy", "fixed:3")["traces"][0]["policies"][0]
    assert found["completed"] == pytest.approx(found["requests"], rel=1e-3)


def test_several_traces_are_reported_apart(run: Run) -> None:
    found = report(run, "poisson", "bursts", "--policy", "fixed:3")
    assert [each["trace"] for each in found["traces"]] == ["poisson", "bursts"]


def test_the_same_seed_gives_the_same_figures(run: Run) -> None:
    first, second = (report(run, "bursts", "--policy", "cost", "--seed", "5")["traces"][0] for _ in range(2))
    assert [first["policies"][0][name] for name in ("cost", "ttft_p95_s")] == [
        second["policies"][0][name] for name in ("cost", "ttft_p95_s")
    ]


def test_drafters_are_scaled_too(run: Run) -> None:
    found = report(run, "poisson", "--policy", "throughput", "--drafts")["traces"][0]["policies"][0]
    assert found["draft_hours"] > 0


def test_a_file_is_replayed(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"t": 0, "prompt_tokens": 90, "output_tokens": 9}\n' * 5)
    found = report(run, str(file), "--policy", "fixed:1")["traces"][0]
    assert (found["trace"], found["policies"][0]["requests"]) == ("mine", 5)


def test_the_table_names_every_policy(run: Run) -> None:
    out = run("autoscale", "simulate", "poisson", "--policy", "latency", "--policy", "fixed:2", *SMALL).out
    assert all(name in out for name in ("poisson: ", "latency", "fixed:2", "TTFT p50"))


def test_a_picture_is_drawn(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert run("autoscale", "simulate", "poisson", "--policy", "fixed:2", "--plot", str(file), *SMALL).code == 0
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sinus",), "trace: sinus: no such file, nor one of poisson, bursts, diurnal"),
        (("poisson", "--policy", "best"), "--policy: best: give latency, throughput, cost, ray"),
        (("poisson", "--policy", "ray:0"), "--policy: ray:0: give"),
        (("poisson", "--policy", "fixed:101"), "--policy: fixed:101: give"),
        (("poisson", "--profile", "none"), "profile: none: no such file"),
        (("poisson", "--min-replicas", "9", "--max-replicas", "8"), "--min-replicas: 9 is more than"),
        (("poisson", "--profile", "smollm2-135m-2cores", "--drafts"), "--drafts: the profile smollm2-135m-2cores"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    outcome = run("autoscale", "simulate", *arguments)
    assert (outcome.code, outcome.out, outcome.err.startswith(f"error: {said}")) == (1, "", True)


def test_a_bad_line_of_a_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("{}\n")
    assert "bad.jsonl, line 1: t: give seconds" in run("autoscale", "simulate", str(file)).err


def test_ctrl_c_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulation, "run", interrupted)
    outcome = run("autoscale", "simulate", "poisson", "--policy", "fixed:1", *SMALL)
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
