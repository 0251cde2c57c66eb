"""How `paceline top` looks: two looks at a server, and what happened in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paceline.cli.client import ServerStatus
from paceline.cli.scrape import Interval
from paceline.cli.status_view import Replica, ago, cell, kv_bar, new_table, sums

TTFT, ITL = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
OUTPUT, PROMPT = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
HITS, LOOKED_FOR = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
DECISIONS_SHOWN = 8
HEADING = 3
"""Lines of a table above its rows."""
WIDE = 120
"""Columns from which every column of a table has room."""


@dataclass(frozen=True, slots=True)
class Look:
    """A server now, in seconds since 1970, and since the look before."""

    status: ServerStatus
    interval: Interval
    url: str
    now: float


def view(look: Look, columns: int = 120, rows: int = 40) -> RenderableType:
    """As much as `columns` and `rows` hold: of many replicas the busiest, and the decisions where there is room."""
    targets, drafts = look.status.targets, look.status.drafts
    above = [headline(look), *totals(look)]
    decisions = decision_lines(look)
    lines = rows - len(above) - HEADING * (bool(targets) + bool(drafts))
    of_replicas = lines - min(len(decisions) + 1, lines // 4) if decisions else lines
    of_drafts = min(len(drafts), max(1, of_replicas // 3, of_replicas - len(targets)))
    of_targets = min(len(targets), max(1, of_replicas - of_drafts))
    parts: list[RenderableType] = [*above]
    wide = columns >= WIDE
    if targets:
        parts += ["", *target_table(look, of_targets, wide=wide)]
    if drafts:
        parts += ["", *draft_table(look, of_drafts, wide=wide)]
    left = lines - of_targets - of_drafts - 1
    if decisions and left > 0:
        parts += ["", *(Text(line, no_wrap=True, overflow="ellipsis", style="dim") for line in decisions[:left])]
    return Group(*parts)


def headline(look: Look) -> Text:
    status = look.status
    wanted = _autoscaling(status)
    replicas = (
        f"{pool}s: {len(there)}{_wanted(wanted.get(pool), len(there))}"
        for pool, there in (("target", status.targets), ("draft", status.drafts))
    )
    seconds = look.interval.seconds
    over = f", over {seconds:.1f} s" if seconds else ""
    return Text.assemble((status.model, "bold"), f" at {look.url}  {', '.join(replicas)}{over}", no_wrap=True)


def totals(look: Look) -> list[Text]:
    """What all targets do together: how much, and how well."""
    seen, targets = look.interval, look.status.targets
    much = (
        f"running {sums(targets, 'running')}, waiting {sums(targets, 'waiting')}",
        f"{number(seen.rate(OUTPUT))} tok/s out, {number(seen.rate(PROMPT))} in",
        f"KV hits {share(seen.ratio(HITS, LOOKED_FOR))}",
    )
    well = (
        f"TTFT {quantiles(seen, TTFT)}",
        f"ITL {quantiles(seen, ITL)}",
        f"accepted {share(seen.ratio(ACCEPTED, DRAFTED))}",
    )
    return [Text(" · ".join(parts), overflow="ellipsis", no_wrap=True) for parts in (much, well)]


def target_table(look: Look, lines: int, *, wide: bool) -> Iterator[RenderableType]:
    """A row for each of the busiest targets."""
    names = ("running", "waiting", "KV", "tok/s", "TTFT p95", "ITL p95", "accepted")
    table = _table("target", (*names, "in tok/s", "depth", "late/s", "sessions") if wide else names)
    seen = look.interval
    shown, more = _busiest(look.status.targets, "running", lines)
    for each in shown:
        replica = str(each.get("replica_id"))
        cells: list[str | Text] = [
            cell(each.get("running")),
            cell(each.get("waiting")),
            kv_bar(each),
            number(seen.rate(OUTPUT, replica=replica)),
            duration(seen.quantile(0.95, TTFT, replica=replica)),
            duration(seen.quantile(0.95, ITL, replica=replica)),
            share(seen.ratio(ACCEPTED, DRAFTED, replica=replica)),
        ]
        if wide:
            cells += [
                number(seen.rate(PROMPT, replica=replica)),
                number(seen.mean("paceline_speculation_depth", replica=replica)),
                number(seen.rate("paceline_late_drafts_total", replica=replica)),
                cell(each.get("sessions")),
            ]
        table.add_row(Text(replica), *cells)
    yield table
    if more:
        yield Text(f"and {more} more", style="dim")


def draft_table(look: Look, lines: int, *, wide: bool) -> Iterator[RenderableType]:
    """A row for each of the busiest drafters."""
    names = ("busy", "tok/s", "sequences")
    table = _table("draft", (*names, "rolled back", "targets", "KV") if wide else names)
    seen = look.interval
    shown, more = _busiest(look.status.drafts, "sequences", lines)
    for each in shown:
        replica = str(each.get("replica_id"))
        cells = [
            share(seen.rate("paceline_drafter_busy_seconds_total", replica=replica)),
            number(seen.rate("paceline_drafter_tokens_total", replica=replica)),
            cell(each.get("sequences")),
        ]
        rolled_back = seen.ratio(
            "paceline_drafter_rolled_back_tokens_total", "paceline_drafter_tokens_total", replica=replica
        )
        table.add_row(
            Text(replica), *cells, *((share(rolled_back), cell(each.get("streams")), kv_bar(each)) if wide else ())
        )
    yield table
    if more:
        yield Text(f"and {more} more", style="dim")


def decision_lines(look: Look) -> list[str]:
    """The last changes of size, the latest first; nothing from a server that does not scale itself."""
    found = [each for each in _autoscaling(look.status).get("decisions") or () if isinstance(each, Mapping)]
    latest = sorted(found, key=lambda each: float(each.get("time") or 0), reverse=True)[:DECISIONS_SHOWN]
    return [
        f"{ago(each.get('time'), look.now):>10}  {each.get('pool')} {each.get('before')} → {each.get('replicas')}"
        f"  {each.get('reason')}: {each.get('text')}"
        for each in latest
    ]


def quantiles(seen: Interval, histogram: str) -> str:
    return ", ".join(f"p{100 * q:.0f} {duration(seen.quantile(q, histogram))}" for q in (0.5, 0.95))


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _autoscaling(status: ServerStatus) -> Mapping[str, Any]:
    found = status.raw.get("autoscaling")
    return found if isinstance(found, Mapping) else {}


def _wanted(pool: Any, there: int) -> str:
    wanted = pool.get("wanted") if isinstance(pool, Mapping) else None
    return "" if wanted in (None, there) else f" of {wanted}"


def _busiest(replicas: Sequence[Replica], by: str, lines: int) -> tuple[list[Replica], int]:
    """Those with the most to do first, as many as fit, in their own order where it is the same; and how many more."""
    shown = len(replicas) if len(replicas) <= lines else max(1, lines - 1)
    ordered = sorted(replicas, key=lambda each: -sums([each], by, "waiting"))
    return ordered[:shown], len(replicas) - shown


def _table(first: str, others: Sequence[str]) -> Table:
    table = new_table(first, others)
    table.show_edge = False
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        column.no_wrap = True
    return table
