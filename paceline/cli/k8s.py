"""`paceline k8s`: Paceline on a Kubernetes cluster with the KubeRay operator."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli import k8s_move
from paceline.cli import k8s_options as options
from paceline.cli.options import Json, group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.cli.console import StatusLine
    from paceline.k8s.api import Api
    from paceline.k8s.kinds import Obj

EPILOG = """\b
Examples:
  paceline k8s apply --preset cpu -n llm --create-namespace
  paceline k8s status -n llm
  paceline k8s diagnose -n llm
"""

k8s_app = group("Run on a Kubernetes cluster that has the KubeRay operator.", EPILOG)

CreateNamespace = Annotated[
    bool, typer.Option("--create-namespace", help="Make the namespace; takes a right of the whole cluster.")
]
ForceConflicts = Annotated[bool, typer.Option("--force-conflicts", help="Take over fields that another tool has set.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is ready.")]
FailFast = Annotated[
    bool,
    typer.Option("--fail-fast", help="Stop waiting at what does not mend itself, such as a pod that fits on no node."),
]
KeepCache = Annotated[
    bool, typer.Option("--keep-cache/--delete-cache", help="Leave volumes, with the models in them, or take them too.")
]
DEFAULT_RELEASE = "paceline"

k8s_app.command("drain", epilog=k8s_move.DRAIN_EPILOG)(k8s_move.drain)
k8s_app.command("upgrade", epilog=k8s_move.UPGRADE_EPILOG)(k8s_move.upgrade)


@k8s_app.command(
    "render",
    epilog="\b\nExamples:\n  paceline k8s render --preset gpu --set target.replicas=2\n"
    "  paceline k8s render -n llm | kubectl diff -f -\n",
)
def render(
    values: options.Values = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    name: options.Release = DEFAULT_RELEASE,
    namespace: options.Namespace = None,
) -> None:
    """Print every object of a release as YAML. No cluster is contacted."""
    from paceline.k8s import chart

    found = chart.gather_values(preset, values or (), sets or ())
    typer.echo(chart.as_yaml(chart.render(found, name=name, namespace=namespace or "default")), nl=False)


@k8s_app.command(
    "apply",
    epilog="\b\nExamples:\n  paceline k8s apply --preset cpu\n"
    "  paceline k8s apply -f values.yaml --set target.replicas=4 --timeout 3600\n",
)
def apply(
    values: options.Values = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    name: options.Release = DEFAULT_RELEASE,
    create_namespace: CreateNamespace = False,
    force_conflicts: ForceConflicts = False,
    no_wait: NoWait = False,
    fail_fast: FailFast = False,
    timeout: options.Timeout = 1800.0,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Make a release what the values say, and wait until it is ready.

    First it is checked that the cluster knows every kind and that this account may do all of it; nothing is changed
    before. Objects are applied server-side: fields that others set stay theirs. What the release had and what is no
    longer rendered is deleted, except volumes. The same command again changes nothing, and finishes what an
    interrupted one left. Ctrl-C ends the waiting alone.
    """
    from paceline.cli.console import StatusLine, stdout
    from paceline.k8s import chart

    with options.connected(kubeconfig, context, namespace) as api:
        found = chart.gather_values(preset, values or (), sets or ())
        objects = chart.render(found, name=name, namespace=api.namespace)
        with StatusLine(stdout()) as status:
            _apply(api, name, objects, create=create_namespace, force=force_conflicts, wait=not no_wait, say=status)
            if not no_wait:
                _wait(api, name, timeout, status, fail_fast=fail_fast)


def _apply(
    api: Api, name: str, objects: Sequence[Obj], *, create: bool, force: bool, wait: bool, say: StatusLine
) -> None:
    from paceline.k8s.apply import apply_objects, check, make_namespace

    say("checking kinds and rights")
    resources = check(api, name, objects, wait=wait)
    if create:
        make_namespace(api)
    for done in apply_objects(api, name, objects, resources, force=force):
        say.clear()
        typer.echo(f"{done.what} {done.outcome}")


def _wait(api: Api, name: str, timeout: float, status: StatusLine, *, fail_fast: bool) -> None:
    from paceline.k8s.apply import wait_ready

    try:
        seen = wait_ready(api, name, timeout_s=timeout, say=status, fail_fast=fail_fast)
    except KeyboardInterrupt:
        status.clear()
        typer.echo(
            f"stopped waiting; release {name} goes on coming up. "
            f"`paceline k8s status --name {name} -n {api.namespace}` shows it, the same command waits again",
            err=True,
        )
        raise typer.Exit(130) from None
    status.clear()
    typer.echo(f"ready: {seen.name} in namespace {api.namespace}")
    typer.echo(f"  kubectl port-forward -n {api.namespace} service/{seen.name}-serve-svc 8000")
    typer.echo('  paceline chat "Hello"')


@k8s_app.command("status", epilog="\b\nExamples:\n  paceline k8s status -n llm\n  paceline k8s status --json\n")
def status(
    name: options.ReleaseFound = None,
    as_json: Json = False,
    api_key: options.ApiKey = None,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Show a release: its pods by group, and of a server that answers its replicas, drafters and sessions.

    Paceline is asked through the API server, so that nothing has to be forwarded.
    """
    from paceline.cli.console import stdout
    from paceline.cli.k8s_view import status_view
    from paceline.k8s.report import look

    with options.connected(kubeconfig, context, namespace) as api:
        report = look(api, name, api_key=api_key)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        console = stdout()
        console.print(status_view(report, columns=console.width))


@k8s_app.command("diagnose", epilog="\b\nExamples:\n  paceline k8s diagnose -n llm || kubectl get events -n llm\n")
def diagnose(
    name: options.ReleaseFound = None,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Say why a release is not ready, each cause with what to do about it. Exits 1 if it is not healthy."""
    from paceline.cli.console import stdout
    from paceline.cli.k8s_view import diagnosis_view
    from paceline.k8s import diagnosis
    from paceline.k8s.snapshot import take
    from paceline.k8s.troubles import troubles

    with options.connected(kubeconfig, context, namespace) as api:
        seen = take(api, name, nodes=True)
        found = diagnosis.diagnose(seen, diagnosis.read_logs(api, troubles(seen)))
    stdout().print(diagnosis_view(found), soft_wrap=True)
    if not found.healthy:
        raise typer.Exit(1)


@k8s_app.command("delete", epilog="\b\nExamples:\n  paceline k8s delete -n llm\n  paceline k8s delete --delete-cache\n")
def delete(
    name: options.Release = DEFAULT_RELEASE,
    keep_cache: KeepCache = True,
    timeout: options.Timeout = 600.0,
    kubeconfig: options.Kubeconfig = None,
    context: options.Context = None,
    namespace: options.Namespace = None,
) -> None:
    """Take a release away that `apply` made, and wait until its pods are gone. Again, it does nothing."""
    from paceline.cli.console import StatusLine, stdout
    from paceline.k8s import delete as deleting

    with options.connected(kubeconfig, context, namespace) as api, StatusLine(stdout()) as say:
        found = deleting.find(api, name)
        gone = deleting.delete(api, name, keep_cache=keep_cache, timeout_s=timeout, say=say, found=found)
        say.clear()
        for each in gone:
            typer.echo(f"{each} deleted")
        if not gone:
            typer.echo(f"nothing of release {name} is in namespace {api.namespace}")
        if found.unseen:
            typer.echo(f"not looked for, this account may not list them: {', '.join(found.unseen)}", err=True)


User = Annotated[
    str | None, typer.Option("--user", metavar="NAME", help="Bind it to this user too.", show_default=False)
]
Account = Annotated[
    str | None,
    typer.Option(
        "--service-account",
        metavar="NAME",
        help="Bind it to this service account of the namespace.",
        show_default=False,
    ),
]


@k8s_app.command(
    "role",
    epilog="\b\nExamples:\n  paceline k8s role -f values.yaml -n llm --service-account ci | kubectl apply -f -\n",
)
def role(
    values: options.Values = None,
    sets: options.Sets = None,
    preset: options.Preset = None,
    user: User = None,
    service_account: Account = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Of the Role.")] = "paceline-admin",
    namespace: options.Namespace = None,
) -> None:
    """Print the Role these commands take for a release of these values, and nothing beyond it. No cluster is contacted.

    A ClusterRole beside it has what belongs to no namespace: nodes, which `diagnose` reads.
    """
    from paceline.errors import ConfigError
    from paceline.k8s import chart
    from paceline.k8s.kinds import guessed
    from paceline.k8s.role import needed, roles, subject_of

    if user is not None and service_account is not None:
        raise ConfigError("--user, --service-account: give one of the two", param="user")
    where = namespace or "default"
    found = chart.gather_values(preset, values or (), sets or ())
    objects = chart.render(found, name=DEFAULT_RELEASE, namespace=where)
    resources = sorted({guessed(obj["apiVersion"], obj["kind"]) for obj in objects}, key=str)
    subject = subject_of(user, service_account, where)
    typer.echo(chart.as_yaml(roles(needed(resources), name=name, namespace=where, subject=subject)), nl=False)
