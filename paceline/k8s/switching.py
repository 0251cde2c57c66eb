"""How far KubeRay is with a change, read from a RayService."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.k8s.kinds import Obj
from paceline.k8s.snapshot import condition

FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
MAX_CHARS = 300


def active_cluster(service: Obj) -> str:
    """The Ray cluster that serves; empty if there is none."""
    return str(_part(service, "activeServiceStatus").get("rayClusterName") or "")


def switched(service: Obj, before: str | None) -> bool:
    """It serves what was last asked for; and from another cluster than `before`, if that is given."""
    status = service.get("status") or {}
    observed = int(status.get("observedGeneration") or 0) >= int(service["metadata"].get("generation") or 0)
    ready = condition(service, "Ready").get("status") == "True"
    upgrading = condition(service, "UpgradeInProgress").get("status") == "True"
    running = all(app.get("status") == "RUNNING" for app in _applications(service, "activeServiceStatus").values())
    return observed and ready and not upgrading and running and (before is None or active_cluster(service) != before)


def problem(service: Obj) -> str | None:
    """What no waiting mends."""
    ready = condition(service, "Ready")
    if ready.get("reason") in ("ValidationFailed", "InitializingTimeout"):
        return _line(f"KubeRay: {ready['reason']}: {ready.get('message', '')}")
    for name, app in _applications(service, _coming(service)).items():
        if app.get("status") in FAILED:
            return _line(f"Serve: application {name} is {app['status']}: {app.get('message') or 'no reason is given'}")
    return None


def pending_words(service: Obj) -> str:
    """What KubeRay is at, in one line."""
    pending = _part(service, "pendingServiceStatus")
    name = str(pending.get("rayClusterName") or "")
    where = f"cluster {name} comes up" if name else f"cluster {active_cluster(service) or '-'}"
    states = [
        f"{app} {told.get('status') or 'not deployed yet'}"
        for app, told in _applications(service, _coming(service)).items()
    ]
    percent = pending.get("trafficRoutedPercent")
    traffic = [] if percent is None else [f"{percent}% of the traffic goes there"]
    told = condition(service, "Ready")
    waits = [] if told.get("status") == "True" else [str(told.get("message") or "not ready")]
    return "; ".join([where, *states, *traffic, *waits])


def _coming(service: Obj) -> str:
    """The part of the status that is about what was asked for last."""
    return (
        "pendingServiceStatus"
        if _part(service, "pendingServiceStatus").get("rayClusterName")
        else "activeServiceStatus"
    )


def _part(service: Obj, name: str) -> Mapping[str, Any]:
    return (service.get("status") or {}).get(name) or {}


def _applications(service: Obj, part: str) -> Mapping[str, Any]:
    return _part(service, part).get("applicationStatuses") or {}


def _line(text: str) -> str:
    """Of a message with a traceback, the end: there is the reason."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_CHARS else f"{flat[:60]} … {flat[-(MAX_CHARS - 60) :]}"
