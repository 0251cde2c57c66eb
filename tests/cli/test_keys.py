"""`paceline keys`: what is made is known, and shown once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paceline.api.keys import KeyFile, KeyRing, parse_keys
from tests.cli.conftest import Run


def test_a_key_is_printed_with_the_line_that_knows_it(run: Run) -> None:
    made = run("keys", "create", "alice", "--requests-per-minute", "60", "--admin")
    found = re.fullmatch(r"key   (pl-[\w-]{43})\nline  (- \{.+\})\n", made.out)
    assert found is not None
    (entry,) = parse_keys(found[2])
    assert (entry.name, entry.requests_per_minute, entry.admin) == ("alice", 60, True)
    assert found[1] not in found[2]


def test_a_line_is_appended_to_a_file_of_its_owner_alone(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = [run("keys", "create", name, "--file", str(file)).out.split()[1] for name in ("alice", "bob", "alice")]
    ring = KeyRing(KeyFile(file))
    assert [ring.caller(key).name for key in keys] == ["alice", "bob", "alice"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_is_checked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.yaml"
    key = run("keys", "create", "alice", "--max-concurrent", "2", "--file", str(file)).out.split()[1]
    monkeypatch.setenv("PACELINE_API_KEY", key)
    checked = run("keys", "check", str(file))
    assert checked.out == "alice, max_concurrent: 2\nthe key in PACELINE_API_KEY is alice's\n"


@pytest.mark.parametrize(("name", "message"), [("a b", "name"), ("", "name")])
def test_a_name_that_is_none_is_refused(run: Run, name: str, message: str) -> None:
    refused = run("keys", "create", name)
    assert refused.code == 1
    assert message in refused.err


def test_a_file_of_another_kind_is_not_touched(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("something: else\n")
    refused = run("keys", "create", "alice", "--file", str(file))
    assert (refused.code, file.read_text()) == (1, "something: else\n")
