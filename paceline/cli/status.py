"""`paceline status`: which replicas a running server has and what they report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paceline.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from paceline.cli.client import ServerStatus

REPLICAS_ABREAST = 4  # fits in 80 columns

EPILOG = """\b
Examples:
  paceline status
  paceline status --url http://10.0.0.5:8000
  paceline status --json | jq '.targets[].replica_id'
"""


def status(url: options.Url = options.DEFAULT_URL, as_json: options.Json = False) -> None:
    """Show the target and draft replicas of a running server.

    A server without a connected drafter answers correctly and slower; this says so.
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
    if warning := draft_warning(found):
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def replica_tables(kind: str, replicas: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One column for each replica, one row for each thing any of them reports, in the order of first sight."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    keys = [key for key in dict.fromkeys(key for replica in replicas for key in replica) if key != "replica_id"]
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


def draft_warning(found: ServerStatus) -> str | None:
    """What to say if a target wants drafters and has none; None if all is well.

    A target that speculates reports how many drafters it knows of and how many it is connected to.
    """
    alone = [target for target in found.targets if "drafters_known" in target and not target.get("drafters_connected")]
    if not alone:
        return None
    names = ", ".join(str(target.get("replica_id")) for target in alone)
    reasons = "; ".join(dict.fromkeys(str(why) for target in alone if (why := target.get("drafter_problems"))))
    because = f" ({reasons})" if reasons else ""
    return f"speculation is on, but no drafter is connected to {names}{because}: answers are right, and slower"
