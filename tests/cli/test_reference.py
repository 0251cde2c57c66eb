from __future__ import annotations

from pathlib import Path

import pytest

from paceline.cli.reference import Key, command_help, keys, main, type_in_words, with_block


def lines() -> dict[str, Key]:
    return {key.name: key for key in keys()}


def test_a_nested_key_has_its_dotted_name() -> None:
    assert lines()["target.engine.max_num_seqs"] == Key(
        "target.engine.max_num_seqs", "integer > 0", "16", "Sequences in one step."
    )


def test_every_key_has_a_description() -> None:
    assert [key.name for key in keys() if not key.description] == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "boolean"}, "boolean"),
        ({"type": "integer", "minimum": 1, "maximum": 16}, "integer ≥ 1, ≤ 16"),
        ({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"const": "auto"}]}, "integer > 0, or auto"),
        ({"enum": ["cpu", "cuda"]}, "cpu, cuda"),
    ],
)
def test_types_are_words(schema: dict[str, object], words: str) -> None:
    assert type_in_words(schema) == words


def test_the_help_of_every_command_is_there() -> None:
    titles = [line for line in command_help().splitlines() if line.startswith("## ")]
    assert titles == [
        "## paceline",
        "## paceline serve",
        "## paceline chat",
        "## paceline status",
        "## paceline top",
        "## paceline doctor",
        "## paceline demo",
        "## paceline eval",
        "## paceline distill",
        "## paceline estimate",
        "## paceline leave",
        "## paceline models",
        "## paceline models pull",
        "## paceline models list",
        "## paceline models path",
        "## paceline keys",
        "## paceline keys create",
        "## paceline keys check",
        "## paceline k8s",
        "## paceline k8s drain",
        "## paceline k8s upgrade",
        "## paceline k8s render",
        "## paceline k8s apply",
        "## paceline k8s status",
        "## paceline k8s diagnose",
        "## paceline k8s delete",
        "## paceline k8s role",
        "## paceline bench",
        "## paceline bench engine",
        "## paceline bench speculation",
        "## paceline autoscale",
        "## paceline autoscale simulate",
        "## paceline cluster",
        "## paceline cluster up",
        "## paceline cluster status",
        "## paceline cluster down",
    ]


@pytest.mark.parametrize("columns", ["40", "400"])
def test_the_help_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    before = command_help()
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert command_help() == before


def test_what_was_written_checks_clean(tmp_path: Path) -> None:
    main(["--write"], tmp_path)
    assert main(["--check"], tmp_path) == 0


def test_drift_exits_with_1(tmp_path: Path) -> None:
    main(["--write"], tmp_path)
    (tmp_path / "docs" / "cli.md").write_text("old")
    assert main(["--check"], tmp_path) == 1


def test_drift_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--write"], tmp_path)
    (tmp_path / "docs" / "cli.md").write_text("old")
    main(["--check"], tmp_path)
    assert capsys.readouterr().err == "differs from the code, run `make docs`: docs/cli.md\n"


def test_a_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Hello\n")
    main(["--write"], tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Hello\n"


def test_a_readme_with_markers_gets_the_settings(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- config:begin -->\nold\n<!-- config:end -->\n")
    main(["--write"], tmp_path)
    assert "| `speculation.depth` |" in (tmp_path / "README.md").read_text()


def test_what_stands_around_the_markers_stays() -> None:
    assert with_block("a\n<!-- config:begin -->\nold\n<!-- config:end -->\nb", "new\n") == (
        "a\n<!-- config:begin -->\nnew\n<!-- config:end -->\nb"
    )
