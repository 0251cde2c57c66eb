"""The image's recipe, read: what it promises to Kubernetes, and that it builds from this tree's own pins."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.cluster.launcher import CLUSTER, ROOT

DOCKERFILE = CLUSTER / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("cpu", "cuda")
CACHES = {
    "PACELINE_CACHE": "/models/paceline",
    "HF_HOME": "/models/huggingface",
    "TRITON_CACHE_DIR": "/models/triton",
}
SECRET = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """`FROM base AS name` and what follows it: (instruction, arguments)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def arguments(self, instruction: str) -> list[str]:
        return [text for word, text in self.steps if word == instruction]


def instructions(text: str) -> list[tuple[str, str]]:
    """Of a Dockerfile, in order; lines that are continued joined, comments gone."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    parts = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(part[0].upper(), part[1] if len(part) > 1 else "") for part in parts]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    current = Stage("", "")
    for word, text in instructions(DOCKERFILE.read_text()):
        if word == "FROM":
            base, _, name = text.partition(" AS ")
            current = found.setdefault(name, Stage(name, base))
        else:
            current.steps.append((word, text))
    return found


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those it is built upon, the first one first."""
    stage = stages[name]
    return [*(lineage(stages, stage.base) if stage.base in stages else []), stage]


def last(stages: dict[str, Stage], name: str, instruction: str) -> str | None:
    """The instruction that counts for an image, if it has one."""
    found = [text for stage in lineage(stages, name) for text in stage.arguments(instruction)]
    return found[-1] if found else None


def variables(stages: dict[str, Stage], name: str) -> dict[str, str]:
    words = [word for stage in lineage(stages, name) for text in stage.arguments("ENV") for word in shlex.split(text)]
    return dict(word.split("=", 1) for word in words)


def installs(stages: dict[str, Stage]) -> list[str]:
    runs = [text for stage in stages.values() for text in stage.arguments("RUN")]
    return [command for text in runs for command in text.split("&&") if "pip install" in command]


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_numbered_user_that_is_not_root(stages: dict[str, Stage], target: str) -> None:
    assert last(stages, target, "USER") == "1000:1000"


@pytest.mark.parametrize("target", TARGETS)
def test_no_entrypoint_stands_before_kuberay_s_command(stages: dict[str, Stage], target: str) -> None:
    assert last(stages, target, "ENTRYPOINT") == "[]"


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_fetched_and_compiled_is_in_the_volume(stages: dict[str, Stage], target: str) -> None:
    folders = {name: value for name, value in variables(stages, target).items() if name in CACHES}
    assert (last(stages, target, "VOLUME"), folders) == ("/models", CACHES)


@pytest.mark.parametrize("target", TARGETS)
def test_the_build_asks_doctor(stages: dict[str, Stage], target: str) -> None:
    assert ["paceline doctor" in text for text in stages[target].arguments("RUN")] == [True]


def test_everything_is_installed_under_the_constraints(stages: dict[str, Stage]) -> None:
    found = installs(stages)
    assert found
    assert [command for command in found if "-c constraints.txt" not in command] == []


def test_no_version_is_named_beside_the_constraints(stages: dict[str, Stage]) -> None:
    assert [command for command in installs(stages) if re.search(r"[=<>~]=", command)] == []


def test_torch_comes_before_what_needs_it(stages: dict[str, Stage]) -> None:
    first = [next(c for c in text.split("&&") if "pip install" in c).split()[-1] for text in _runs_with_pip(stages)]
    assert first == ["torch", "'.[otel,quantization,redis]'", "torch", "'.[gpu,otel,quantization,redis]'"]


def _runs_with_pip(stages: dict[str, Stage]) -> list[str]:
    return [text for stage in stages.values() for text in stage.arguments("RUN") if "pip install" in text]


def test_the_extras_exist(stages: dict[str, Stage]) -> None:
    named = {extra for c in installs(stages) for found in re.findall(r"\.\[(.+?)\]", c) for extra in found.split(",")}
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


def test_it_takes_no_secret(stages: dict[str, Stage]) -> None:
    every = [text for stage in stages.values() for word in ("ENV", "ARG") for text in stage.arguments(word)]
    assert [text for text in every if SECRET.search(text)] == []


def test_only_what_it_is_built_from_reaches_the_builder() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(allowed) == ["LICENSE", "README.md", "constraints.txt", "paceline", "pyproject.toml"]


def test_the_builder_gets_what_the_project_names() -> None:
    named = [PROJECT["readme"], *PROJECT["license-files"]]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert [name for name in named if f"!{name}" not in allowed] == []


def test_the_base_s_python_is_one_that_the_project_takes(stages: dict[str, Stage]) -> None:
    base = next(text for word, text in instructions(DOCKERFILE.read_text()) if word == "ARG")
    version = re.fullmatch(r"BASE=docker\.io/library/python:(3\.\d+)-slim-\w+", base)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]


def test_its_commands_are_shell(stages: dict[str, Stage]) -> None:
    for command in (text for stage in stages.values() for text in stage.arguments("RUN")):
        subprocess.run(["/bin/sh", "-n", "-c", command], check=True, timeout=10)


def test_the_readme_builds_both(stages: dict[str, Stage]) -> None:
    text = (CLUSTER / "README.md").read_text()
    assert [target for target in TARGETS if f"--target {target} " in text and target in stages] == list(TARGETS)


def test_the_readme_names_this_version() -> None:
    text = "\n".join(path.read_text() for path in (CLUSTER / "README.md", DOCKERFILE))
    assert set(re.findall(r"paceline:(\d+\.\d+\.\d+)-", text)) == {PROJECT["version"]}
