"""How `paceline status` looks: tables and lines from what a server reports, which may lack any of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paceline.cli.client import ServerStatus
from paceline.cli.stats import percent, source_table
from paceline.speculation.telemetry import merged
from paceline.types import SourceMetrics

Replica = Mapping[str, Any]

REPLICAS_ABREAST = 4  # fits in 80 columns
SESSIONS_SHOWN = 10
BAR_CELLS = 10
_ELSEWHERE = (
    "replica_id",
    "speculation",
    "handoff",
    "warnings",
    "tensor_parallel_size",
    "ranks",
    "telemetry",
    "load",
    "sessions_by_state",
)
"""What a replica reports that is no row of its table."""


_WORDS = ("model", "address", "target", "tier", "KV")
"""Columns that are no numbers."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A server at one time, in seconds since 1970."""

    status: ServerStatus
    sessions: Sequence[Mapping[str, Any]]
    url: str
    now: float


def view(seen: Seen, *, all_facts: bool = False, columns: int = 120) -> RenderableType:
    """All of it. With `all_facts`, everything each replica reports, in place of a line for each."""
    targets, drafts = seen.status.targets, seen.status.drafts
    parts: list[RenderableType] = [headline(seen)]
    if all_facts:
        parts += [*replica_tables("target", targets), *replica_tables("draft", drafts)]
    else:
        parts += [table for table in (target_table(targets), draft_table(drafts)) if table is not None]
    parts += [table for table in (speculation_table(targets), session_table(seen, columns)) if table is not None]
    parts += [Text(line, style="dim") for line in notes(seen)]
    alarms = [*warnings(targets), *map(str, scaling(seen).get("waiting") or ())]
    parts += [Text(f"WARNING: {alarm}", style="bold red") for alarm in alarms]
    return Group(*parts)


def headline(seen: Seen) -> Text:
    targets = seen.status.targets
    total, filled = sums(targets, "kv_tokens_total"), sums(targets, "kv_tokens_in_use", "kv_tokens_cached")
    return Text.assemble(
        (seen.status.model, "bold"),
        f" at {seen.url}  targets: {len(targets)}, drafts: {len(seen.status.drafts)}, running:"
        f" {sums(targets, 'running')}, waiting: {sums(targets, 'waiting')}, KV: {percent(filled, total)},"
        f" sessions: {len(seen.sessions)}",
    )


def target_table(targets: Sequence[Replica]) -> Table | None:
    """A row for each target."""
    table = new_table(
        "target", ("running", "waiting", "KV", "sessions", "drafters", "drafted", "accepted", "acceptance")
    )
    for each in targets:
        drafters = (
            f"{cell(each.get('drafters_connected'))} of {each['drafters_known']}" if "drafters_known" in each else "-"
        )
        drafted, accepted = each.get("drafted_tokens"), each.get("accepted_tokens")
        counts = (cell(each.get("sessions")), drafters, cell(drafted), cell(accepted))
        table.add_row(
            Text(cell(each.get("replica_id"))),
            cell(each.get("running")),
            cell(each.get("waiting")),
            kv_bar(each),
            *counts,
            percent(accepted or 0, drafted or 0),
        )
    return table if targets else None


def draft_table(drafts: Sequence[Replica]) -> Table | None:
    """A row for each drafter."""
    table = new_table("draft", ("model", "streams", "sequences", "KV", "drafted", "rolled back", "address"))
    for each in drafts:
        names = ("replica_id", "model", "streams", "sequences")
        rolled = percent(each.get("rolled_back_tokens") or 0, each.get("drafted_tokens") or 0)
        table.add_row(
            *(Text(cell(each.get(name))) for name in names),
            kv_bar(each),
            cell(each.get("drafted_tokens")),
            rolled,
            Text(cell(each.get("address"))),
        )
    return table if drafts else None


def session_table(seen: Seen, columns: int) -> Table | None:
    """A row for each of the sessions used last."""
    latest = sorted(seen.sessions, key=lambda each: float(each.get("updated") or 0), reverse=True)[:SESSIONS_SHOWN]
    table = new_table("session", ("target", "tier", "KV tokens", "history", "turns", "used"))
    table.columns[0].max_width = max(20, columns - 70)
    table.columns[0].no_wrap = True
    for each in latest:
        running = " running" if each.get("running") else ""
        table.add_row(
            Text(cell(each.get("session_id"))),
            Text(cell(each.get("replica_id"))),
            f"{cell(each.get('kv_tier'))}{running}",
            cell(each.get("cached_tokens")),
            cell(each.get("history_tokens")),
            cell(each.get("turns")),
            ago(each.get("updated"), seen.now),
        )
    if (more := len(seen.sessions) - len(latest)) > 0:
        table.caption = f"and {more} more"
    return table if latest else None


def replica_tables(kind: str, replicas: Sequence[Replica]) -> Iterator[Table]:
    """One column for each replica, one row for each thing any of them reports, in the order of first sight."""
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


def speculation_table(targets: Sequence[Replica]) -> Table | None:
    """Of all targets together, a row for each source that had candidates verified; None if there is none."""
    told = [target.get("speculation") or {} for target in targets]
    sources = merged(
        [SourceMetrics(name, tuple(counts["drafted"]), tuple(counts["accepted"]), int(counts.get("wasted") or 0))]
        for each in told
        for name, counts in (each.get("sources") or {}).items()
    )
    return source_table(sources)


def notes(seen: Seen) -> Iterator[str]:
    """What is no table."""
    targets = seen.status.targets
    if any(target.get("speculation") for target in targets):
        yield speculation_line(targets)
    router = seen.status.raw.get("router") or {}
    if routes := {why: times for why, times in (router.get("routes") or {}).items() if why}:
        yield "placed: " + ", ".join(f"{why.replace('_', ' ')} {times}" for why, times in routes.items())
    if router.get("resumptions"):
        yield f"answers resumed elsewhere: {router['resumptions']}"
    yield from scaling_lines(seen)
    yield from rank_lines([*targets, *seen.status.drafts])


def scaling(seen: Seen) -> Mapping[str, Any]:
    """What the autoscaler says; empty if there is none."""
    found = seen.status.raw.get("autoscaling")
    return found if isinstance(found, Mapping) and found.get("enabled") else {}


def scaling_lines(seen: Seen) -> Iterator[str]:
    """How many replicas of each pool are wanted, and why."""
    told = scaling(seen)
    for pool in ("target", "draft"):
        wanted = told.get(pool)
        if isinstance(wanted, Mapping) and wanted.get("text"):
            yield f"autoscaling {pool}s: {wanted.get('wanted')} wanted, {wanted.get('reason')}: {wanted['text']}"
    if told.get("errors"):
        yield f"autoscaling: the policy failed {told['errors']} times, last with {told.get('error')}"


def speculation_line(targets: Sequence[Replica]) -> str:
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


def rank_lines(replicas: Sequence[Replica]) -> Iterator[str]:
    """Of every replica with several ranks: the process, node and cores of each."""
    for replica in replicas:
        if ranks := replica.get("ranks"):
            told = (f"{at['rank']}: process {at['pid']} on {at['node']}, {_cores(at['cores'])}" for at in ranks)
            yield f"ranks of {replica.get('replica_id')}: {'; '.join(told)}"


def warnings(targets: Sequence[Replica]) -> list[str]:
    """What replicas warn of, each thing once, with the replicas that say it."""
    found: dict[str, list[str]] = {}
    for target in targets:
        for text in target.get("warnings") or ():
            found.setdefault(str(text), []).append(str(target.get("replica_id")))
    return [f"{text} [{', '.join(names)}]" for text, names in found.items()]


def kv_bar(replica: Replica) -> Text:
    """How full the KV cache is: in use, cached, free."""
    total = sums([replica], "kv_tokens_total")
    if not total:
        return Text("-")
    used, filled = sums([replica], "kv_tokens_in_use"), sums([replica], "kv_tokens_in_use", "kv_tokens_cached")
    # A cell for whatever there is at all.
    cells, held = (min(BAR_CELLS, -(-BAR_CELLS * part // total)) for part in (used, filled))
    bar = (("━" * cells, "green"), ("━" * (held - cells), "cyan"), ("─" * (BAR_CELLS - held), "dim"))
    return Text.assemble(*bar, f" {percent(filled, total):>4}")


def cell(value: object) -> str:
    """A reported value as people read it."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ago(then: float | None, now: float) -> str:
    """How long ago, in the largest unit."""
    if not then:
        return "-"
    gone = max(0, int(now - then))
    for seconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if gone >= seconds:
            return f"{gone // seconds} {unit} ago"
    return f"{gone} s ago"


def sums(replicas: Sequence[Replica], *names: str) -> int:
    return sum(int(replica.get(name) or 0) for replica in replicas for name in names)


def new_table(first: str, others: Sequence[str]) -> Table:
    """Words to the left, which give way where there is no room; numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        words = name in _WORDS
        table.add_column(name, justify="left" if words else "right", no_wrap=words, overflow="ellipsis")
    return table


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
