"""How `paceline k8s` looks: a release as tables, a diagnosis as lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from paceline.cli.client import ServerStatus
from paceline.cli.console import printable
from paceline.cli.status_view import Seen, ago, new_table, view

if TYPE_CHECKING:
    from paceline.k8s.diagnosis import Diagnosis
    from paceline.k8s.report import Report


def status_view(report: Report, columns: int) -> RenderableType:
    """The release, its pods, and the server's own view of itself."""
    style = "green" if report.seen.ready else "yellow"
    title = Text.assemble((report.seen.name, "bold"), f" in namespace {report.namespace}: ", (report.headline, style))
    parts: list[RenderableType] = [title, pod_table(report)]
    if report.server is None:
        parts.append(Text(f"the server does not answer: {report.silence}", style="yellow"))
        return Group(*parts)
    told = report.server
    server = ServerStatus(
        str(told.get("model")), tuple(told.get("targets") or ()), tuple(told.get("drafts") or ()), told
    )
    seen = Seen(server, tuple(report.sessions), f"service {report.seen.name}-serve-svc", time.time())
    return Group(*parts, view(seen, columns=columns))


def pod_table(report: Report) -> RenderableType:
    """A row for each pod, by group."""
    if not report.pods:
        return Text("no pods", style="dim")
    table = new_table("pod", ("group", "phase", "ready", "restarts", "node", "age"))
    for pod in report.pods:
        ready = Text("yes", style="green") if pod.ready else Text("no", style="yellow")
        now = report.seen.now.timestamp()
        age = ago(now - pod.age_s, now)
        table.add_row(pod.name, pod.group, pod.phase, ready, str(pod.restarts), pod.node or "-", age)
    return table


def diagnosis_view(found: Diagnosis) -> RenderableType:
    """The verdict, the causes with their remedies and logs, then what Kubernetes said meanwhile."""
    lines: list[Text] = [Text(found.verdict, style="bold green" if found.healthy else "bold")]
    for place, cause in enumerate(found.causes):
        lines += [Text(f"{place + 1}. {cause.what}"), Text(f"   do: {cause.remedy}", style="cyan")]
        lines += [Text(f"   | {printable(line)}", style="dim") for line in found.logs.get(place, ())]
    if found.causes and not found.nodes_read:
        lines.append(Text("nodes were not looked at: this account may not list them", style="dim"))
    if found.events:
        lines.append(Text("warnings, newest first:"))
        for event in found.events:
            times = f" ({event.times} times)" if event.times > 1 else ""
            lines.append(Text(f"  {_age(event.age_s):>7}  {event.about}: {event.reason}: {event.message}{times}"))
    if not found.healthy and found.conditions:
        lines.append(Text("conditions:"))
        for each in found.conditions:
            told = f" {each.get('reason')}: {each.get('message')}".rstrip(": ")
            lines.append(Text(f"  {each.get('type')}={each.get('status')}{told}", style="dim"))
    return Group(*lines)


def _age(seconds: float) -> str:
    return ago(time.time() - seconds, time.time())
