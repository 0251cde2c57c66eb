from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.cli import diagnosis
from paceline.cli.diagnosis import (
    Cache,
    Engine,
    Library,
    Package,
    Port,
    Problem,
    Ranks,
    Report,
    Sums,
    problems,
    read_cache,
    read_libraries,
    read_package,
    read_ranks,
)
from paceline.cli.doctor import rows, runs
from paceline.cli.hardware import GIB, Cpu, Gpu, Memory, free_disk, nvidia_driver_present, read_cpu, read_memory
from paceline.engine.backends import Choice
from paceline.engine.tp import shared_memory
from paceline.numa import Binding, Node
from tests.cli.conftest import Run

HEALTHY = Report(
    cpu=Cpu("Xeon 6", ("avx2", "amx_bf16")),
    memory=Memory(64 * GIB, 32 * GIB),
    shared_memory=8 * GIB,
    gpus=(),
    nvidia_driver=False,
    python="3.12.1",
    packages=(Package("torch", "2.13.0"), Package("ray", "2.60.0")),
    engine=Engine(16, (Choice("device", "cpu", "torch sees no GPU"),)),
    cache=Cache("/cache", 100 * GIB, True),
    ports=(Port(8000, "HTTP", None), Port(9000, "gRPC", None)),
)
NO_TORCH = replace(HEALTHY, packages=(Package("torch", None, "ImportError: no libtorch"),), engine=Engine(None, ()))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Report:
    """What `doctor` finds: HEALTHY, or the test's parameter."""
    found: Report = getattr(request, "param", HEALTHY)
    monkeypatch.setattr(diagnosis, "collect", lambda: found)
    return found


def only_problem(report: Report) -> Problem:
    (problem,) = problems(report)
    return problem


def test_a_healthy_machine_has_no_problems() -> None:
    assert problems(HEALTHY) == []


def test_a_package_that_does_not_import_is_required() -> None:
    assert only_problem(NO_TORCH).required


def test_a_package_that_does_not_import_is_named_with_its_error() -> None:
    assert only_problem(NO_TORCH).summary == "torch does not import: ImportError: no libtorch"


def test_a_cache_that_cannot_be_written_is_required() -> None:
    assert only_problem(replace(HEALTHY, cache=Cache("/cache", 100 * GIB, False))).required


def test_a_taken_port_is_a_warning() -> None:
    taken = Port(8000, "HTTP", "already in use")
    assert only_problem(replace(HEALTHY, ports=(taken,))) == Problem(
        "port 8000 (HTTP): already in use", "stop what uses it, or serve with --port"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nvidia_driver": True}, "torch sees no GPU"),
        ({"cpu": Cpu("old", ())}, "no AVX2"),
        ({"memory": Memory(4 * GIB, 1 * GIB)}, "1.0 GiB of memory"),
        ({"shared_memory": 64 * 2**20}, "/dev/shm is small: 64 MiB"),
        ({"cache": Cache("/cache", GIB // 2, True)}, "0.5 GiB of disk"),
    ],
)
def test_a_shortage_is_a_warning(change: dict[str, object], words: str) -> None:
    problem = only_problem(replace(HEALTHY, **change))
    assert (words in problem.summary, problem.required) == (True, False)


def test_a_gpu_makes_the_cpus_flags_irrelevant() -> None:
    assert problems(replace(HEALTHY, cpu=Cpu("old", ()), gpus=(Gpu("H200", 141 * GIB),))) == []


NO_TRITON = replace(HEALTHY, libraries=(Library("triton", "our kernel", "Triton is not installed; install it"),))


def test_a_library_for_a_gpu_is_not_missed_without_one() -> None:
    assert problems(NO_TRITON) == []


def test_a_library_that_a_gpu_lacks_is_a_warning_with_its_remedy() -> None:
    problem = only_problem(replace(NO_TRITON, gpus=(Gpu("H200", 141 * GIB),)))
    assert problem == Problem("no triton: our kernel is not available", "Triton is not installed; install it")


def test_the_report_shows_what_a_gpu_would_lack_and_the_remedy() -> None:
    assert ("for a GPU", "triton", "missing", "our kernel: Triton is not installed; install it") in rows(NO_TRITON)


def test_the_libraries_for_a_gpu_are_named() -> None:
    names = [library.name for library in read_libraries()]
    assert names == ["triton", "flash-attn 3", "bitsandbytes", "torchao", "accelerate"]


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao", "accelerate"])
def test_a_library_that_is_not_installed_is_found_missing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(diagnosis, "find_spec", lambda asked: None if asked == name else object())
    missing = {library.name: library.missing for library in read_libraries()}
    assert missing[name] is not None and missing[name].startswith(f"{name} is not installed; pip install")


def test_attention_layout_and_compilation_are_among_the_choices() -> None:
    names = [choice.name for choice in diagnosis.read_engine().choices]
    assert {"attention", "kv layout", "compile"} <= set(names)


TWO_SOCKETS = replace(
    HEALTHY,
    ranks=Ranks(
        (Node(0, ((0, 4), (1, 5)), 64 * GIB), Node(1, ((2,), (3,)), 32 * GIB)),
        (Binding(0, (0, 1), (0,)), Binding(1, (2, 3))),
        (Sums("shm", "no C++ compiler"), Sums("gloo", None)),
    ),
)


@pytest.mark.parametrize(
    "row",
    [
        ("ranks", "node 0", "cores 0-1, 4 threads", "64.0 GiB"),
        ("", "node 1", "cores 2-3", "32.0 GiB"),
        ("", "rank 0", "cores 0-1", "memory of node 0"),
        ("", "rank 1", "cores 2-3", "memory of the machine"),
        ("", "shm", "does not run", "no C++ compiler"),
        ("", "gloo", "runs", ""),
    ],
)
def test_the_report_shows_how_ranks_would_share_the_machine(row: tuple[str, str, str, str]) -> None:
    assert row in rows(TWO_SOCKETS)


@pytest.mark.parametrize("report", [TWO_SOCKETS], indirect=True)
def test_json_has_the_bindings(run: Run, report: Report) -> None:
    binding = {"rank": 0, "cores": [0, 1], "nodes": [0], "bound": True}
    assert json.loads(run("doctor", "--json").out)["ranks"]["bindings"][0] == binding


def test_two_ranks_are_bound_at_least() -> None:
    assert len(read_ranks(True).bindings) >= 2


def test_without_torch_nothing_is_said_of_sums() -> None:
    assert read_ranks(False).collectives == ()


def test_shared_memory_that_does_not_compile_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "library", lambda: "no C++ compiler")
    assert read_ranks(True).collectives[0] == Sums("shm", "no C++ compiler")


@pytest.mark.parametrize(("numbers", "text"), [((0, 1, 2, 8), "0-2,8"), ((5,), "5"), ((), "")])
def test_numbers_in_a_row_are_written_as_a_run(numbers: tuple[int, ...], text: str) -> None:
    assert runs(numbers) == text


def test_required_problems_come_first() -> None:
    broken = replace(NO_TORCH, nvidia_driver=True, ports=(Port(8000, "HTTP", "already in use"),))
    assert [problem.required for problem in problems(broken)] == [True, False, False]


def test_a_healthy_machine_exits_with_0(run: Run, report: Report) -> None:
    assert run("doctor").code == 0


def test_the_report_shows_choices_with_their_reasons(run: Run, report: Report) -> None:
    assert "torch sees no GPU" in run("doctor").out


def test_the_report_shows_the_flags_that_are_missing(run: Run, report: Report) -> None:
    assert "without avx512f, amx_tile" in run("doctor").out


@pytest.mark.parametrize("report", [NO_TORCH], indirect=True)
def test_something_required_that_is_broken_exits_with_1(run: Run, report: Report) -> None:
    assert run("doctor").code == 1


@pytest.mark.parametrize("report", [NO_TORCH], indirect=True)
def test_a_problem_is_printed_with_its_remedy(run: Run, report: Report) -> None:
    assert (
        "ERROR: torch does not import: ImportError: no libtorch\n  remedy: reinstall with `make clean install`\n"
        in run("doctor").out
    )


@pytest.mark.parametrize("report", [NO_TORCH], indirect=True)
def test_json_has_the_problems(run: Run, report: Report) -> None:
    assert json.loads(run("doctor", "--json").out)["problems"][0]["required"] is True


@pytest.mark.parametrize("report", [NO_TORCH], indirect=True)
def test_json_exits_with_1_too(run: Run, report: Report) -> None:
    assert run("doctor", "--json").code == 1


def test_this_machine_can_run_paceline(run: Run) -> None:
    assert [problem for problem in problems(diagnosis.collect()) if problem.required] == []


def test_a_broken_package_is_reported_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_binary.py").write_text("raise OSError('libfoo.so:\\n  not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_package("broken_binary") == Package("broken_binary", None, "OSError: libfoo.so: not found")


def test_a_packages_version_is_read_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_package("yaml").version == sys.modules["yaml"].__version__


def test_a_cache_that_does_not_exist_is_not_created(tmp_path: Path) -> None:
    assert (read_cache(tmp_path / "a" / "b").writable, (tmp_path / "a").exists()) == (True, False)


def test_free_disk_of_a_missing_folder_is_its_parents(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0


def test_cpu_flags_that_matter_are_read(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Xeon\nflags\t\t: sse avx2 amx_tile avx512fp16\n\nmodel name\t: second\n")
    assert read_cpu(cpuinfo) == Cpu("Xeon", ("avx2", "amx_tile"))


def test_an_arm_cpu_has_unknown_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert read_cpu(cpuinfo).flags is None


def test_without_cpuinfo_the_platform_names_the_cpu(tmp_path: Path) -> None:
    assert read_cpu(tmp_path / "nothing").flags is None


def test_memory_is_cut_to_the_cgroups_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert read_memory(tmp_path) == Memory(1000, 600)


def test_a_cgroup_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory(tmp_path).total > 1000


def test_the_nvidia_driver_is_its_device_file(tmp_path: Path) -> None:
    assert not nvidia_driver_present(tmp_path / "nvidiactl")
