"""What `status` tells: a release as Kubernetes has it, and what Paceline in it says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import PacelineError, Unavailable
from paceline.k8s.api import Api
from paceline.k8s.kinds import Obj, name_of
from paceline.k8s.server import ServerProxy
from paceline.k8s.snapshot import Snapshot, age_s, group_of, pod_ready, take
from paceline.k8s.waiting import waits_for


@dataclass(frozen=True, slots=True)
class PodLine:
    """One pod, as a row."""

    name: str
    group: str
    phase: str
    ready: bool
    restarts: int
    node: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """`server` is Paceline's own `/status`, None if it does not answer; then `silence` says why."""

    seen: Snapshot
    namespace: str
    pods: Sequence[PodLine]
    server: Mapping[str, Any] | None = None
    sessions: Sequence[Mapping[str, Any]] = ()
    silence: str = ""

    @property
    def headline(self) -> str:
        if self.seen.ready:
            return "ready"
        serving = self.seen.condition("Ready").get("status") == "True"
        return f"{'serves, changing' if serving else 'not ready'}: waits for {waits_for(self.seen)}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "ray_service": self.seen.name,
            "namespace": self.namespace,
            "ready": self.seen.ready,
            "waits_for": None if self.seen.ready else waits_for(self.seen),
            "conditions": list(self.seen.status.get("conditions") or ()),
            "serve_endpoints": int(self.seen.status.get("numServeEndpoints") or 0),
            "pods": [
                {name: getattr(pod, name) for name in ("name", "group", "phase", "ready", "restarts", "node", "age_s")}
                for pod in self.pods
            ],
            "server": self.server,
            "sessions": list(self.sessions),
            "server_error": self.silence or None,
        }


def look(api: Api, release: str | None, *, api_key: str | None = None) -> Report:
    """A release now. A server that does not answer is part of the report, a release that is not there an error."""
    seen = take(api, release)
    pods = [pod_line(pod, seen) for pod in seen.ray_pods]
    pods += [pod_line(pod, seen) for pod in seen.pods if pod not in seen.ray_pods]
    server = ServerProxy.of_service(api, seen.name, api_key=api_key)
    try:
        told = server.status()
        return Report(seen, api.namespace, pods, told, server.sessions())
    except Unavailable as error:
        return Report(seen, api.namespace, pods, silence=error.message)
    except PacelineError as error:
        if seen.ready:  # it serves: what keeps it from us, a right or a key, is for the user to mend
            raise
        return Report(seen, api.namespace, pods, silence=error.message)


def pod_line(pod: Obj, seen: Snapshot) -> PodLine:
    status = pod.get("status") or {}
    phase = "Terminating" if pod["metadata"].get("deletionTimestamp") else str(status.get("phase") or "Pending")
    containers = status.get("containerStatuses") or ()
    return PodLine(
        name_of(pod),
        group_of(pod),
        phase,
        pod_ready(pod),
        sum(int(each.get("restartCount") or 0) for each in containers),
        str(pod["spec"].get("nodeName") or ""),
        age_s(pod["metadata"].get("creationTimestamp"), seen.now),
    )
