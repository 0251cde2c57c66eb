"""`paceline status`: which replicas a running server has and what they report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paceline.cli import options
from paceline.speculation.telemetry import merged
from paceline.types import SourceMetrics

if TYPE_CHECKING:
    from rich.table import Table


REPLICAS_ABREAST = 4  # fits in 80 columns
_ELSEWHERE = ("replica_id", "speculation", "handoff", "warnings", "tensor_parallel_size", "ranks")
"""What a replica reports that is no row of the table."""

EPILOG = """\b
Examples:
  paceline status
  paceline status --url http://10.0.0.5:8000
  paceline status --json | jq '.targets[].replica_id'
"""


def status(url: options.Url = options.DEFAULT_URL, as_json: options.Json = False) -> None:
    """Show the target and draft replicas of a running server.

    Below them, where each rank of a replica with several of them runs, and what speculation does: for each source of
    candidates how many were verified and became output, and at which places of a run. A server whose speculation is
    configured and idle answers correctly and slower; this says so, and why.
    """
    from paceline.cli.client import Client
    from paceline.cli.console import stdout

    with Client(url) as client:
        found = client.status()
    if as_json:
        print(json.dumps(found.raw, indent=2))
        return
    console = stdout()
    counts = f"targets: {len(found.targets)}, drafts: {len(found.drafts)}"
    console.print(f"{found.model} at {client.url}; {counts}", markup=False)
    for table in (*replica_tables("target", found.targets), *replica_tables("draft", found.drafts)):
        console.print(table)
    for line in rank_lines([*found.targets, *found.drafts]):
        console.print(line, markup=False, soft_wrap=True)
    if (sources := speculation_table(found.targets)) is not None:
        console.print(sources)
    if any(target.get("speculation") for target in found.targets):
        console.print(speculation_line(found.targets), markup=False, soft_wrap=True)
    for warning in warnings(found.targets):
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def replica_tables(kind: str, replicas: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One column for each replica, one row for each thing any of them reports, in the order of first sight."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    keys = [key for key in dict.fromkeys(key for replica in replicas for key in replica) if key not in _ELSEWHERE]
    told = [key for key in keys if any(replica.get(key) not in (None, "") for replica in replicas)]
    for start in range(0, len(replicas), REPLICAS_ABREAST):
        abreast = replicas[start : start + REPLICAS_ABREAST]
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(Text(kind))
        for replica in abreast:
            table.add_column(Text(cell(replica.get("replica_id"))), justify="right", overflow="fold")
        for key in told:
            table.add_row(key.replace("_", " "), *(Text(cell(replica.get(key))) for replica in abreast))
        yield table


def cell(value: object) -> str:
    """A reported value as people read it."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def speculation_table(targets: Sequence[Mapping[str, Any]]) -> Table | None:
    """Of all targets together, a row for each source that had candidates verified; None if there is none."""
    from rich import box
    from rich.table import Table

    told = [target.get("speculation") or {} for target in targets]
    sources = merged(
        [SourceMetrics(name, tuple(counts["drafted"]), tuple(counts["accepted"]), int(counts.get("wasted") or 0))]
        for each in told
        for name, counts in (each.get("sources") or {}).items()
    )
    if not sources:
        return None
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("speculation")
    for heading in ("drafted", "accepted", "rolled back", "wasted", "acceptance", "by place in the run"):
        table.add_column(heading, justify="right", overflow="fold")
    for each in sources:
        drafted, accepted = sum(each.drafted), sum(each.accepted)
        places = " ".join(_percent(a, d) for a, d in zip(each.accepted, each.drafted, strict=True))
        counts = (str(drafted), str(accepted), str(each.rolled_back), str(each.wasted), _percent(accepted, drafted))
        table.add_row(each.source.replace("_", " "), *counts, places)
    return table


def speculation_line(targets: Sequence[Mapping[str, Any]]) -> str:
    """What no source has to itself."""
    told = [target.get("speculation") or {} for target in targets]
    late = sum(int(each.get("late") or 0) for each in told)
    connected = ", ".join(
        f"{target.get('drafters_connected')} of {target['drafters_known']}"
        for target in targets
        if "drafters_known" in target
    )
    drafters = f"; drafters connected to each target: {connected}" if connected else ""
    verification = "/".join(dict.fromkeys(str(each["verification"]) for each in told if each.get("verification")))
    return f"speculation ({verification or 'off'}): {late} late{drafters}"


def rank_lines(replicas: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of every replica with several ranks: the process, node and cores of each."""
    for replica in replicas:
        if ranks := replica.get("ranks"):
            told = (f"{at['rank']}: process {at['pid']} on {at['node']}, {_cores(at['cores'])}" for at in ranks)
            yield f"ranks of {replica.get('replica_id')}: {'; '.join(told)}"


def _cores(cores: Sequence[int]) -> str:
    """As `taskset -c` writes them."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    named = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"core{'' if len(cores) == 1 else 's'} {named}"


def warnings(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """What replicas warn of, each thing once, with the replicas that say it."""
    found: dict[str, list[str]] = {}
    for target in targets:
        for text in target.get("warnings") or ():
            found.setdefault(str(text), []).append(str(target.get("replica_id")))
    return [f"{text} [{', '.join(names)}]" for text, names in found.items()]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
