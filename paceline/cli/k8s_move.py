"""`paceline k8s drain` and `paceline k8s upgrade`: what moves sessions from pods to pods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import k8s_options as options

if TYPE_CHECKING:
    from paceline.cli.console import StatusLine

DRAIN_EPILOG = """\b
Examples:
  paceline k8s drain gpu-node-3 -n llm
  paceline k8s drain paceline-x7k2p-targets-worker-9dl4q -n llm --deadline 120
  paceline k8s drain gpu-node-3 -n llm --dry-run
"""
UPGRADE_EPILOG = """\b
Examples:
  paceline k8s upgrade -f values.yaml -n llm --dry-run
  paceline k8s upgrade -f values.yaml --set image.tag=0.2.0 -n llm
"""
SPARE_S = 300.0
"""Beyond a drain's deadline: pods end, budgets are waited for."""

What = Annotated[str, typer.Argument(metavar="NODE|POD", help="A node of Kubernetes, or a pod of the release.")]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline",
        metavar="SECONDS",
        min=1.0,
        max=604_800.0,
        help="For replicas to start elsewhere and hand over their sessions; without room elsewhere they wait for "
        "almost all of it.",
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Also the head pod, with its cluster, and the last node with room for a target."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
LoseSessions = Annotated[
    bool, typer.Option("--lose-sessions", help="Also if the new version does not have the sessions of the old one.")
]
SameOutput = Annotated[
    bool, typer.Option("--same-output", help="Fail if a seeded answer differs, also with another model or image.")
]
Canary = Annotated[
    bool, typer.Option("--canary", help="Look at a canary also before a change that needs no new cluster.")
]
ForceConflicts = Annotated[bool, typer.Option("--force-conflicts", help="Take over fields that another tool has set.")]


def drain(
    what: What,
    name: options.ReleaseFound = None,
    deadline: Deadline = 600.0,
    force: Force = False,
    dry_run: DryRun = False,
    api_key: options.ApiKey = None,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Empty a node, or a pod, of a release without losing a session.

    The node is cordoned. Ray then starts the replicas of its pods elsewhere, and those on them hand the KV of their
    sessions over; only when a pod holds nothing any more is it evicted, as disruption budgets allow. Pods that are not
    the release's stay. The same command again goes on where an interrupted one ended.
    """
    from paceline.cli.console import StatusLine, stdout
    from paceline.k8s.drain import Drain, plan
    from paceline.k8s.kinds import name_of
    from paceline.k8s.pace import Pace
    from paceline.k8s.release import find_service
    from paceline.k8s.server import ServerProxy

    with options.connected(kubeconfig, context, namespace) as api:
        found = plan(api, what, name, force=force)
        if dry_run:
            typer.echo("\n".join(found.lines()))
            return
        server = ServerProxy.of_service(api, name_of(find_service(api, name)), api_key=api_key)
        with StatusLine(stdout()) as say:
            work = Drain(api, server, found, Pace(deadline + SPARE_S), say, deadline_s=deadline, force=force)
            with _interruptible(say, lambda: [*work.done, *_go_on(found.node)]):
                work.run()
        for line in (*work.done, *found.told_of_others()):
            typer.echo(line)
        typer.echo(f"{what} is drained" + (f"; kubectl uncordon {found.node} takes it back" if found.node else ""))


def upgrade(
    values: options.Values = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    name: options.Release = "paceline",
    lose_sessions: LoseSessions = False,
    same_output: SameOutput = False,
    always_canary: Canary = False,
    force_conflicts: ForceConflicts = False,
    dry_run: DryRun = False,
    timeout: options.Timeout = 3600.0,
    api_key: options.ApiKey = None,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Change a release to what the values say, and keep every session.

    Where pods change, a canary with the new version comes up beside the release first: it must answer, give seeded
    questions the same answers if the model stays, and see the running version's sessions. Only then is the release
    changed; KubeRay brings up its new cluster and switches. Then a session from before is asked on. A change of
    settings alone is made in place. The same command again goes on where an interrupted one ended.
    """
    from paceline.cli.console import StatusLine, stdout
    from paceline.k8s import chart
    from paceline.k8s.pace import Pace
    from paceline.k8s.upgrade import Options, Upgrade

    chosen = Options(lose_sessions, same_output, force_conflicts, always_canary)
    with options.connected(kubeconfig, context, namespace) as api, StatusLine(stdout()) as say:

        def tell(text: str) -> None:
            say.clear()
            typer.echo(text)

        gathered = chart.gather_values(preset, values or (), sets or ())
        rendered = chart.render(gathered, name=name, namespace=api.namespace)
        work = Upgrade(api, name, rendered, chosen, Pace(timeout), say=say, tell=tell, api_key=api_key)
        found = work.plan()
        for line in (f"{found.way}:" if found.changes else "nothing changes", *found.lines()):
            tell(line)
        if dry_run:
            return
        with _interruptible(say, lambda: [_state(touched=work.touched)]):
            work.run()


def _go_on(node: str | None) -> list[str]:
    undo = f"kubectl uncordon {node} takes the node back; a Ray node that drains ends in any case"
    return ["the same command goes on with it", *([] if node is None else [undo])]


def _state(*, touched: bool) -> str:
    if touched:
        return "the release is being changed, and KubeRay goes on with it; the same command goes on with the checks"
    return "the release is untouched, a canary may be there; the same command goes on, and deletes it at its end"


@contextmanager
def _interruptible(say: StatusLine, state: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Ctrl-C ends it with what has been done, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say.clear()
        for line in ("interrupted", *state()):
            typer.echo(line, err=True)
        raise typer.Exit(130) from None
