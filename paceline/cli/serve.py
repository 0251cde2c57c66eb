"""`paceline serve`: a local cluster until Ctrl-C."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from paceline.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from paceline.config import AppSettings
    from paceline.serving.cluster import Endpoints

EPILOG = """\b
Examples:
  paceline serve
  paceline serve --model ./my-model --targets 1 --drafts 2 --port 8080
  paceline serve deployments/local-cpu.yaml --host 0.0.0.0
"""


def serve(
    config: options.Config = None,
    model: options.Model = None,
    drafts: options.Drafts = None,
    targets: options.Targets = None,
    host: options.Host = None,
    port: options.Port = None,
    grpc_port: options.GrpcPort = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> None:
    """Serve a model on this machine until Ctrl-C.

    Fetches the model if it is not in the cache, starts a local Ray, deploys router, targets and drafts, and prints the
    URLs. Ctrl-C or SIGTERM stops everything; a second one does not wait.
    """
    from paceline.cli.cluster import fetch_models, running_cluster, wait_for_interrupt
    from paceline.cli.console import StatusLine, stdout
    from paceline.cli.deployment import Overrides, read_deployment

    overrides = Overrides(model, drafts, targets, host, port, grpc_port, tls_cert, tls_key)
    deployment = read_deployment(config, overrides)
    deployment.require_free_ports()
    console = stdout()
    fetch_models(deployment.settings, console)
    with running_cluster(deployment.config, StatusLine(console)) as endpoints:
        announce(console, deployment.settings, endpoints)
        if (why := deployment.open_to_strangers) is not None:
            console.print(
                f"\nWARNING: there are no API keys, and {why}.\n"
                "         Make some with `paceline keys create`; see docs/security.md.",
                markup=False,
                soft_wrap=True,
            )
        wait_for_interrupt()
    console.print("stopped")


def announce(console: Console, settings: AppSettings, endpoints: Endpoints) -> None:
    """Print what runs, where, and two ways to talk to it."""
    body = json.dumps(
        {"model": settings.public_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    )
    lines = (
        f"{settings.public_name} is ready: {replicas(settings)}",
        f"  HTTP  {endpoints.http}  (OpenAI-compatible)",
        f"  gRPC  {endpoints.grpc}  (paceline.v1.Inference)",
        "",
        "Try it:",
        f"  curl {endpoints.http}/v1/chat/completions -H 'content-type: application/json' \\",
        f"    -d '{body}'",
        f"  paceline chat --url {endpoints.http}",
        "",
        "Ctrl-C stops it.",
    )
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def replicas(settings: AppSettings) -> str:
    """The number of replicas of each kind, in words."""
    counts = (
        (settings.num_routers, "router"),
        (settings.target.num_replicas, "target"),
        (settings.draft.num_replicas, "draft"),
    )
    return ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for count, kind in counts)
