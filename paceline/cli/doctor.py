"""`paceline doctor`: what this machine offers, what Paceline would choose on it, and what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from paceline.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from paceline.cli.diagnosis import Library, Problem, Ranks, Report
    from paceline.numa import Binding, Node

EPILOG = """\b
Examples:
  paceline doctor
  paceline doctor --json | jq .problems
"""


def doctor(as_json: options.Json = False) -> None:
    """Check this machine and say what is wrong.

    Shows hardware, versions, the model cache, what the automatic settings resolve to, how the ranks of a replica with
    tensor_parallel_size would share this machine and whether the default ports are free, then the problems found and
    their remedies. Exit code 1 if something required is broken.
    """
    from paceline.cli.console import stdout
    from paceline.cli.diagnosis import collect, problems

    report = collect()
    found = problems(report)
    if as_json:
        print(json.dumps({**asdict(report), "problems": [asdict(problem) for problem in found]}, indent=2))
    else:
        show(stdout(), report, found)
    if any(problem.required for problem in found):
        raise typer.Exit(1)


def show(console: Console, report: Report, found: list[Problem]) -> None:
    """The report as aligned lines, the problems below."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for title, name, value, reason in rows(report):
        table.add_row(title, name, Text(value), Text(reason))
    console.print(table)
    console.print()
    if not found:
        console.print("No problems found.")
    for problem in found:
        word, style = ("ERROR", "bold red") if problem.required else ("warning", "yellow")
        console.print(f"{word}: {problem.summary}", style=style, markup=False, soft_wrap=True)
        console.print(f"  remedy: {problem.remedy}", markup=False, soft_wrap=True)


def rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Section (on its first line), name, value, remark."""
    yield from _section("hardware", _hardware(report))
    packages = [(package.name, package.version or "does not import", "") for package in report.packages]
    yield from _section("versions", [("python", report.python, ""), *packages])
    libraries = [(each.name, "missing" if each.missing else "installed", _remark(each)) for each in report.libraries]
    yield from _section("for a GPU", libraries)
    yield from _section("model cache", [("folder", report.cache.folder, f"{_gib(report.cache.free)} free")])
    yield from _section("choices", [(choice.name, choice.value, choice.reason) for choice in report.engine.choices])
    yield from _section("ranks", _ranks(report.ranks))
    ports = [(port.purpose, str(port.number), port.trouble or "free") for port in report.ports]
    yield from _section("ports", ports)


def _hardware(report: Report) -> list[tuple[str, str, str]]:
    from paceline.cli.hardware import CPU_FLAGS

    flags = report.cpu.flags or ()
    missing = [flag for flag in CPU_FLAGS if flag not in flags]
    cores = "unknown" if report.engine.cores is None else str(report.engine.cores)
    gpus = [("GPU", gpu.name, _gib(gpu.memory)) for gpu in report.gpus]
    return [
        ("CPU", report.cpu.model, ""),
        ("cores", cores, "usable by this process: affinity and cgroup quota"),
        ("flags", " ".join(flags) or "-", f"without {', '.join(missing)}" if missing else ""),
        ("memory", _gib(report.memory.total), f"{_gib(report.memory.free)} free"),
        *(gpus or [("GPU", "none", "")]),
    ]


def _ranks(ranks: Ranks) -> list[tuple[str, str, str]]:
    """Nodes, what each rank would be bound to, and how ranks could sum."""
    nodes = [(f"node {node.number}", f"cores {_cores(node)}", _gib(node.memory)) for node in ranks.nodes]
    bound = [(f"rank {each.rank}", f"cores {runs(each.cores)}", _memory(each)) for each in ranks.bindings]
    sums = [
        (each.name, "runs" if each.missing is None else "does not run", each.missing or "")
        for each in ranks.collectives
    ]
    return [*nodes, *bound, *sums]


def _cores(node: Node) -> str:
    """By their first threads, and how many threads in all where that is more."""
    threads = sum(map(len, node.cores))
    text = runs([core[0] for core in node.cores])
    return text if threads == len(node.cores) else f"{text}, {threads} threads"


def _memory(binding: Binding) -> str:
    """Where a rank's memory would come from."""
    return f"memory of node {runs(binding.nodes)}" if binding.nodes else "memory of the machine"


def runs(numbers: Sequence[int]) -> str:
    """Ascending numbers as the kernel lists them: 0-3,8."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _remark(library: Library) -> str:
    return library.purpose if library.missing is None else f"{library.purpose}: {library.missing}"


def _section(title: str, lines: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str, str]]:
    for number, (name, value, remark) in enumerate(lines):
        yield title if number == 0 else "", name, value, remark


def _gib(size: int) -> str:
    from paceline.cli.hardware import GIB

    return f"{size / GIB:.1f} GiB"
