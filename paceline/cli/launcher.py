"""`paceline cluster`: a Ray cluster on hosts of one's own, really up and really down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Json, group

if TYPE_CHECKING:
    from rich.table import Table

    from paceline.launcher import Cluster, HostState

EPILOG = """\b
Examples:
  paceline cluster up cluster/onprem.yaml
  paceline cluster status cluster/onprem.yaml
  paceline cluster down cluster/onprem.yaml
"""

cluster_app = group("A Ray cluster on hosts of your own, over SSH; in clouds use `ray up` and `ray down`.", EPILOG)

File = Annotated[Path, typer.Argument(metavar="FILE", help="Cluster launcher file of Ray, with provider local.")]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=1, help="For all hosts to be set up and to join.")
]


@cluster_app.command("up", epilog=EPILOG)
def up(file: File, timeout: Timeout = 1800.0) -> None:
    """Run `ray up`, then wait until every host of the file has joined.

    A host that does not join is named, with the end of its log. Where the head runs already nothing is restarted:
    this waits for what is missing. For a changed file: down, then up.
    """
    from paceline.cli.console import StatusLine, stdout

    console = stdout()
    with StatusLine(console) as line:
        states = _cluster(file, line).up(timeout)
    console.print(table(states))


@cluster_app.command("status", epilog=EPILOG)
def status(file: File, as_json: Json = False) -> None:
    """Look at every host: reached, runs Ray, has joined, its resources, the replicas on it.

    Ends with 1 if a host has not joined.
    """
    from paceline.cli.console import stdout

    states = _cluster(file).status()
    if as_json:
        print_json(states)
    else:
        stdout().print(table(states))
    if not all(state.joined for state in states):
        raise typer.Exit(1)


@cluster_app.command("down", epilog=EPILOG)
def down(file: File) -> None:
    """Run `ray down`, which stops the head; then stop Ray on every other host, and look that nothing is left.

    This ends every Ray of the file's user on these hosts, as `ray up` does before it starts one.
    """
    from paceline.cli.console import StatusLine, stdout

    console = stdout()
    with StatusLine(console) as line:
        stopped = _cluster(file, line).down()
    for host, processes in stopped.items():
        console.print(f"{host}: " + (f"stopped, had {processes} processes of Ray" if processes else "Ray did not run"))


def _cluster(file: Path, report: object = None) -> Cluster:
    from paceline.launcher import Cluster, load_cluster_file

    found = load_cluster_file(file)
    return Cluster(found, report) if callable(report) else Cluster(found)


def print_json(states: list[HostState]) -> None:
    import json
    from dataclasses import asdict

    print(json.dumps([{**asdict(state), "ray_runs": state.ray_runs} for state in states], indent=2))


def table(states: list[HostState]) -> Table:
    """A line for each host, and what is on it."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("host", "", "Ray", "joined", "resources", "replicas"):
        shown.add_column(title, overflow="fold")
    for state in states:
        resources = ", ".join(f"{name} {amount:g}" for name, amount in state.resources.items())
        runs = state.problem or ("runs" if state.ray_runs else "does not run")
        shown.add_row(
            state.host,
            "head" if state.head else "",
            runs,
            "yes" if state.joined else "no",
            resources or "-",
            "\n".join(state.replicas) or "-",
        )
    return shown
