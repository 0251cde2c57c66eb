"""Options of `paceline k8s`, and the connection they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paceline.k8s.api import Api

Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        "--kubeconfig", metavar="PATH", help="By default KUBECONFIG, then ~/.kube/config.", show_default=False
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        "--context", metavar="NAME", help="Of the kubeconfig; by default its current one.", show_default=False
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="By default the context's.", show_default=False),
]
Release = Annotated[str, typer.Option("--name", metavar="RELEASE", help="Name of the release.")]
ReleaseFound = Annotated[
    str | None,
    typer.Option("--name", metavar="RELEASE", help="By default the only one there is.", show_default=False),
]
Values = Annotated[
    list[Path] | None,
    typer.Option(
        "--values", "-f", metavar="PATH", help="File of values; of several, the last wins.", show_default=False
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One value, as Helm takes it; may be repeated.", show_default=False
    ),
]
Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="Values to begin with: cpu, gpu or xeon.", show_default=False),
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=1.0, max=86_400.0, help="Wait no longer than that.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", help="Paceline's; by default PACELINE_API_KEY.", show_default=False),
]


def connected(kubeconfig: Path | None, context: str | None, namespace: str | None) -> Api:
    """As `kubectl` would connect. Raises ConfigError, also where the extra is not installed."""
    from paceline.k8s.connect import connect

    return connect(kubeconfig, context, namespace)
