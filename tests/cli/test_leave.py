"""`paceline leave` as a hook of a container: its lines, and its end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from typer.testing import CliRunner, Result

from paceline.cli.app import app
from paceline.cli.leave import Lines


def leave(*arguments: str) -> Result:
    return CliRunner(env={"RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled"}).invoke(app, ["leave", *arguments])


def test_without_a_cluster_it_says_what_to_set_and_ends_well() -> None:
    done = leave()
    assert (done.exit_code, done.output) == (
        0,
        "leave: sessions may lose their KV: address: no Ray cluster is named; set RAY_ADDRESS, or give --address\n",
    )


def test_a_cluster_that_nobody_answers_for_is_not_waited_for() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = leave("--address", address)
    assert done.exit_code == 0
    assert f"no Ray cluster answers at {address}: " in done.output


def test_an_address_that_is_none_is_told() -> None:
    done = leave("--address", "auto")
    assert done.exit_code == 0
    assert "no Ray cluster answers at auto" in done.output


def test_a_time_that_is_none_is_refused() -> None:
    done = leave("--within", "0")
    assert done.exit_code == 2
    assert "--within" in done.output


def test_lines_go_to_the_log_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    say = Lines(log)
    say("one")
    say("two")
    assert log.read_text() == "leave: one\nleave: two\n"


def test_a_log_that_cannot_be_written_is_told_and_no_more(tmp_path: Path) -> None:
    done = leave("--log", str(tmp_path))
    assert done.exit_code == 0
    assert f"{tmp_path}: Is a directory" in done.output


def test_a_pipe_that_nobody_reads_does_not_hold_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = leave("--log", str(pipe))
    assert done.exit_code == 0
    assert "no Ray cluster is named" in done.output
